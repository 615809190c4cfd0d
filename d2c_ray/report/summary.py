def print_summary(plan): pass
