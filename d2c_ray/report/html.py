def write(plan): pass
