"""report: one page of what was done and what it bought."""

from d2c_ray.plan import Plan
from d2c_ray.report import html


def run(plan: Plan) -> None:
    html.write(plan)
