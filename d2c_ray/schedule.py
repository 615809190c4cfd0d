"""Which stages start, and on how many places (a core or a GPU each): of a run, and of one that is planned."""

from collections.abc import Callable, Iterable

from d2c_ray.config import pools
from d2c_ray.plan import Node

WORKERS_OF = {"train": "train_workers", "teacher": "teacher_workers"}  # fields of `resources`


def starting(waiting: list[Node], running: list[Node], free: int, done: Callable[[Node], bool]) -> list[tuple[Node, int]]:
    """The stages that start now, and the places of each.

    What wants more places than there are runs alone rather than never.

    Args:
        waiting: stages that have not begun, in order. free: places that nobody has. done: whether a stage is finished.
    """
    found: list[tuple[Node, int]] = []
    ready = in_turn(node for node in waiting if all(map(done, node.inputs.values())))
    for index, node in enumerate(ready):
        wanted = places(node, free, ready[index + 1 :], [*waiting, *running])
        if wanted <= free or not (running or found):
            free -= wanted
            found.append((node, wanted))
    return found


def workers(node: Node) -> int:
    """Places a training takes; 0 for a stage that takes what it gets."""
    knob = WORKERS_OF.get(node.stage)
    return getattr(node.config.resources, knob) if knob else 0


def in_turn(ready: Iterable[Node]) -> list[Node]:
    """Stages that could start, those last that nothing waits for but the measuring at the end."""
    return sorted(ready, key=_patient)


def places(node: Node, free: int, behind: list[Node], unfinished: list[Node]) -> int:
    """The places that a stage gets which could start.

    What the students wait for shares them evenly. A stage that only the measuring waits for takes the fewest meanwhile: it would keep
    those that nobody happens to use at the moment, as while a teacher is looked at, from the long stages that follow.

    Args:
        free: places that nobody has. behind: the stages after it, of those that could start. unfinished: all stages that wait or run.
    """
    if node.stage == "manifest":
        return 1
    if workers(node):
        return workers(node)
    if _patient(node) and any(other.name != node.name and node.name not in _names(other) for other in unfinished):
        return least(node)
    patient = sum(map(_patient, behind))
    return max(least(node), (free - patient) // (1 + len(behind) - patient))


def _patient(node: Node) -> bool:
    return node.stage == "reference"


def _names(node: Node) -> list[str]:
    return [given.name for given in node.inputs.values()]


def least(node: Node) -> int:
    """The fewest places a stage can work on: pools one behind the other want an actor each, or two stages wait for each other's."""
    return pools(node.config) if node.stage == "attach" else 1
