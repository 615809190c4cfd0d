"""Quotas of the classes and the exact ranks of every image in its class."""

from collections.abc import Iterator

import numpy as np

from d2c_ray.errors import UserError
from d2c_ray.selection.baselines import Members


def budget_images(budget: float, total: int) -> int:
    """The budget in images: a count, or up to 1 a share of `total`, rounded down."""
    return int(budget * total + 1e-9) if budget <= 1 else int(budget)


def quotas(sizes: np.ndarray, budget: int, balance: str) -> np.ndarray:
    """How many images each class gives, summing to `budget`; never more than a class has.

    equal: the same for all, the remainder one each to the first classes in label order. proportional: by size, largest
    remainders first. What a class is short of goes one image each to the others in label order, round after round.

    Raises:
        UserError: a budget above the dataset or under one image a class.
    """
    sizes = np.asarray(sizes, np.int64)
    present = np.flatnonzero(sizes)
    if budget > sizes.sum():
        raise UserError(
            f"select.budget asks for {budget} images; there are {sizes.sum()}. A budget up to {sizes.sum()} (or a share up to 1) would do."
        )
    if budget < len(present):
        raise UserError(
            f"select.budget asks for {budget} images of {len(present)} classes, under one a class; {len(present)} or more would do."
        )
    wanted = np.zeros(len(sizes), np.int64)
    if balance == "equal":
        wanted[present] = budget // len(present)
        wanted[present[: budget % len(present)]] += 1
    else:
        exact = sizes * budget  # in units of 1 / total, to stay in integers
        wanted = np.maximum(exact // sizes.sum(), (sizes > 0).astype(np.int64))
        remainders = exact - wanted * sizes.sum()
        while wanted.sum() != budget:  # one image a class at least may have given away too many
            if wanted.sum() < budget:
                label = int(np.argmax(remainders))
                wanted[label] += 1
                remainders[label] -= sizes.sum()
            else:
                giving = np.where(wanted > 1, remainders, np.iinfo(np.int64).max)
                label = int(np.argmin(giving))
                wanted[label] -= 1
                remainders[label] += sizes.sum()
    taken = np.minimum(wanted, sizes)
    missing = budget - int(taken.sum())
    while missing:
        open_classes = np.flatnonzero(taken < sizes)
        if len(open_classes) <= missing:
            rounds = max(1, min(int((sizes - taken)[open_classes].min()), missing // len(open_classes)))
            taken[open_classes] += rounds
            missing -= rounds * len(open_classes)
        else:
            taken[open_classes[:missing]] += 1
            missing = 0
    return taken


def by_class(labels: np.ndarray, sample_ids: np.ndarray, scores: np.ndarray) -> Iterator[tuple[int, np.ndarray, Members]]:
    """Each class in label order: its label, the rows it came from in rank order, and its members.

    Ranks are ascending by score, ties by sample_id, which is key order; the order of the input does not matter.

    Raises:
        UserError: scores that are not finite.
    """
    broken = ~np.isfinite(scores)
    if broken.any():
        raise UserError(
            f"{broken.sum()} scores are not finite, the first of sample_id {sample_ids[broken][:5].tolist()}: the teacher gives no number for them. Score again with another teacher or in fp32."
        )
    order = np.lexsort((sample_ids, scores, labels))
    borders = np.flatnonzero(np.diff(labels[order])) + 1
    for rows in np.split(order, borders):
        if len(rows):
            yield int(labels[rows[0]]), rows, Members(int(labels[rows[0]]), sample_ids[rows], scores[rows])
