"""Quotas, ranks and selectors."""

from fractions import Fraction

import numpy as np
import pytest

from d2c_ray.config import SelectConfig
from d2c_ray.errors import UserError
from d2c_ray.selection import rank
from d2c_ray.selection.baselines import SELECTORS
from d2c_ray.selection.interval import interval_ranks, nominal_fraction


def test_published_settings() -> None:
    """ImageNet's 1,300 images a class: n=10 k=96, n=50 k=16, n=100 k=10, and the fractions the paper names."""
    for count, k, nominal, deepest in ((10, 96, 0.74, 0.665), (50, 16, 0.62, 0.603), (100, 10, 0.77, 0.762)):
        ranks = interval_ranks(1300, count, k=k)
        assert ranks.tolist() == list(range(0, count * k, k))
        assert nominal_fraction(ranks, 1300) == pytest.approx(nominal, abs=0.005)
        assert ranks[-1] / 1300 == pytest.approx(deepest, abs=0.001)


def test_k_one_is_easiest_and_f_one_spans_the_class() -> None:
    assert interval_ranks(50, 7, k=1).tolist() == list(range(7))
    for size, count in ((50, 7), (1300, 10), (13, 13), (100, 3)):
        assert interval_ranks(size, count, f=1.0)[-1] == (count - 1) * size // count


def test_f_is_exact_where_floats_are_not() -> None:
    assert interval_ranks(10, 7, f=0.7).tolist() == [0, 1, 2, 3, 4, 5, 6]
    for size, count, f in ((1000, 3, 0.3), (170, 30, 0.7), (1001, 100, 0.1), (10, 1, 0.1)):
        assert interval_ranks(size, count, f=f).tolist() == [int(Fraction(str(f)) * i * size / count) for i in range(count)]


@pytest.mark.parametrize(
    ("size", "count", "expected"), [(20, 4, [0, 6, 12, 18]), (5, 5, [0, 1, 2, 3, 4]), (5, 1, [0]), (8, 5, [0, 1, 2, 3, 4])]
)
def test_a_class_too_small_for_the_stride_gets_the_largest_that_fits(size: int, count: int, expected: list[int]) -> None:
    assert interval_ranks(size, count, k=10).tolist() == expected
    assert interval_ranks(size, count, f=0.05).tolist() == expected


def test_interval_never_repeats_or_leaves_the_class() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        size = int(rng.integers(1, 200))
        count = int(rng.integers(1, size + 1))
        options = {"k": int(rng.integers(1, 60))} if rng.random() < 0.5 else {"f": round(float(rng.uniform(0.01, 1)), 3)}
        ranks = interval_ranks(size, count, **options)
        assert len(ranks) == count
        assert (np.diff(ranks) > 0).all()
        assert ranks[0] >= 0
        assert ranks[-1] < size


def test_interval_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="quota of 6"):
        interval_ranks(5, 6, k=1)
    with pytest.raises(ValueError, match="exactly one"):
        interval_ranks(5, 2, k=1, f=0.5)


def test_quotas_by_hand() -> None:
    assert rank.quotas(np.array([10, 10, 10]), 8, "equal").tolist() == [3, 3, 2]
    assert rank.quotas(np.array([1, 10, 10]), 9, "equal").tolist() == [1, 4, 4]
    assert rank.quotas(np.array([2, 10, 3, 10]), 20, "equal").tolist() == [2, 8, 3, 7]  # the last image goes to the first open class
    assert rank.quotas(np.array([0, 5, 5]), 4, "equal").tolist() == [0, 2, 2]
    assert rank.quotas(np.array([100, 10, 10]), 12, "proportional").tolist() == [10, 1, 1]
    assert rank.quotas(np.array([1000, 1, 1]), 10, "proportional").tolist() == [8, 1, 1]
    assert rank.quotas(np.array([5, 6]), 11, "equal").tolist() == [5, 6]


def test_remainders_go_round_by_round_in_label_order() -> None:
    """The rule written as the loop it describes."""
    rng = np.random.default_rng(1)
    for _ in range(300):
        sizes = rng.integers(0, 30, rng.integers(1, 12))
        present = [label for label, size in enumerate(sizes) if size]
        if not present:
            continue
        budget = int(rng.integers(len(present), sizes.sum() + 1))
        wanted = {label: budget // len(present) + (place < budget % len(present)) for place, label in enumerate(present)}
        taken = {label: min(wanted[label], int(sizes[label])) for label in present}
        missing = budget - sum(taken.values())
        while missing:
            for label in present:
                if missing and taken[label] < sizes[label]:
                    taken[label] += 1
                    missing -= 1
        assert rank.quotas(sizes, budget, "equal").tolist() == [taken.get(label, 0) for label in range(len(sizes))]


def test_proportional_quotas_hold_their_sum_and_bounds() -> None:
    rng = np.random.default_rng(2)
    for _ in range(300):
        sizes = rng.integers(0, 300, rng.integers(1, 12))
        if not sizes.sum():
            continue
        budget = int(rng.integers((sizes > 0).sum(), sizes.sum() + 1))
        taken = rank.quotas(sizes, budget, "proportional")
        assert taken.sum() == budget
        assert (taken <= sizes).all()
        assert (taken[sizes > 0] >= 1).all()


def test_budgets_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="asks for 31 images; there are 30"):
        rank.quotas(np.array([10, 20]), 31, "equal")
    with pytest.raises(UserError, match="1 images of 2 classes, under one a class"):
        rank.quotas(np.array([10, 20]), 1, "equal")
    assert rank.budget_images(0.1, 1797) == 179
    assert rank.budget_images(1.0, 7) == 7
    assert rank.budget_images(0.07, 100) == 7
    assert rank.budget_images(300.0, 1797) == 300


def rows(count: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.integers(0, 3, count), np.arange(count), np.round(rng.random(count), 1).astype(np.float32)  # many ties


@pytest.mark.parametrize("selector", SELECTORS)
def test_order_of_the_input_changes_nothing(selector: str) -> None:
    labels, ids, scores = rows()
    options = SelectConfig(selector=selector, k=3 if selector == "interval" else 0)

    def chosen(order: np.ndarray) -> list[list[int]]:
        return [
            members.sample_ids[SELECTORS[selector](members, 5, options)].tolist()
            for _, _, members in rank.by_class(labels[order], ids[order], scores[order])
        ]

    assert chosen(np.arange(60)) == chosen(np.random.default_rng(4).permutation(60))


def test_ties_are_broken_by_key() -> None:
    (found,) = [members for _, _, members in rank.by_class(np.zeros(4, int), np.array([3, 1, 2, 0]), np.float32([1, 1, 0, 1]))]
    assert found.sample_ids.tolist() == [2, 0, 1, 3]


def test_selectors_by_hand() -> None:
    (members,) = [members for _, _, members in rank.by_class(np.zeros(6, int), np.arange(6), np.float32([5, 3, 4, 0, 2, 1]))]
    assert members.sample_ids[SELECTORS["easiest"](members, 2, SelectConfig())].tolist() == [3, 5]
    assert members.sample_ids[SELECTORS["hardest"](members, 2, SelectConfig())].tolist() == [0, 2]
    assert members.sample_ids[SELECTORS["interval"](members, 3, SelectConfig(k=2))].tolist() == [3, 4, 2]


def test_random_ignores_scores_and_nests() -> None:
    labels, ids, scores = np.zeros(40, int), np.arange(40), np.random.default_rng(5).random(40).astype(np.float32)
    (one,) = [members for _, _, members in rank.by_class(labels, ids, scores)]
    (two,) = [members for _, _, members in rank.by_class(labels, ids, -scores)]
    select, options = SELECTORS["random"], SelectConfig(seed=3)
    small = one.sample_ids[select(one, 5, options)].tolist()
    assert small == two.sample_ids[select(two, 5, options)].tolist()
    assert small == one.sample_ids[select(one, 9, options)].tolist()[:5]
    assert small != one.sample_ids[select(one, 5, SelectConfig(seed=4))].tolist()


def test_scores_that_are_no_numbers_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"2 scores are not finite.*\[7, 9\]"):
        list(rank.by_class(np.zeros(3, int), np.array([7, 8, 9]), np.float32([np.nan, 1, np.inf])))
