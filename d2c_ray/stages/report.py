"""report: one page of what was done and what it bought, and the numbers in the datasets' cards."""

import json

from d2c_ray.plan import Plan
from d2c_ray.report import card, html


def run(plan: Plan) -> bool:
    """Writes the report unless the one that is there shows the same folders; says whether it did."""
    for node in plan.of("attach"):
        students = {arm: plan.arms[arm]["evaluate"].folder for arm in node.arms}
        card.update(node.folder, {arm: json.loads((folder / "metrics.json").read_text()) for arm, folder in students.items()})
    if html.is_current(plan):
        return False
    html.write(plan)
    return True
