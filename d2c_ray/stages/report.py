"""report: one page of what was done and what it bought."""

from d2c_ray.plan import Plan
from d2c_ray.report import html


def run(plan: Plan) -> bool:
    """Writes the report unless the one that is there shows the same folders; says whether it did."""
    if html.is_current(plan):
        return False
    html.write(plan)
    return True
