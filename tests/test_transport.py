"""GADC's selector against reference cases, against the objective and the search written out plainly, and its properties."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2c_ray.config import TransportConfig, from_dict
from d2c_ray.errors import UserError
from d2c_ray.selection import transport

OPTIONS = TransportConfig()


def one_class(count: int, width: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Clustered, skewed features and cross entropies that are small beside them."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(4, width)) * 2
    y = np.maximum(centres[rng.integers(0, 4, count)] + rng.normal(size=(count, width)), 0) + rng.normal(size=(count, width)) * 0.1
    return y.astype(np.float32), (rng.exponential(size=count) * 0.03).astype(np.float32)


def plain_objective(y: np.ndarray, ce: np.ndarray, rows, options: TransportConfig = OPTIONS) -> tuple[float, float, float]:
    """The definition, written down."""
    y, ce, rows = y.astype(np.float64), ce.astype(np.float64), list(rows)
    m, n = len(rows), len(y)
    distances = np.square(y[:, None] - y[None]).sum(2)
    median = np.sort(distances, axis=None)[(n * n - 1) // 2]
    epsilon = options.epsilon_absolute or options.epsilon * median
    cost = np.vstack([distances[rows], np.full((1, n), options.gamma * median)])
    kernel = np.exp(-cost / epsilon)
    source, target = np.append(np.full(m, 1 / m), options.kappa - 1), np.full(n, options.kappa / n)
    u, v = np.ones(m + 1), np.ones(n)
    for _ in range(options.iterations):
        u = source / (kernel @ v)
        v = target / (kernel.T @ u)
    plan = u[:, None] * kernel * v
    sd = y[rows].std(0, ddof=1) if m > 1 else 0.0
    spread = np.square(sd - y.std(0, ddof=1)).sum()
    moments = options.mean_weight * np.square(y[rows].mean(0) - y.mean(0)).sum() + spread
    return (plan[:m] * cost[:m]).sum(), options.statistics * moments, options.confidence * median * ce[rows].mean()


def plain_search(y: np.ndarray, ce: np.ndarray, count: int) -> tuple[list[int], float]:
    """Greedy insertion, then the best swap of all until none helps."""
    value, rows = lambda rows: sum(plain_objective(y, ce, rows)), []
    for _ in range(count):
        rows = min(([*rows, j] for j in range(len(y)) if j not in rows), key=value)
    while True:
        swaps = [[*rows[:i], j, *rows[i + 1 :]] for i in range(count) for j in range(len(y)) if j not in rows]
        best = min(swaps, key=value)
        if value(best) >= value(rows) - 1e-8:
            return rows, value(rows)
        rows = best


@pytest.mark.parametrize("name", ["cat_500", "ship_1300"])
@pytest.mark.parametrize("which", ["greedy", "refined"])
def test_objective_of_the_reference_cases(name: str, which: str, gadc_case) -> None:
    case = gadc_case(name)
    problem = transport.prepare(case["features"].astype(np.float32), case["ce"], replace(OPTIONS, epsilon_absolute=12.0))
    parts = transport.objective(problem, case[which])
    assert problem.dummy == pytest.approx(float(case["dummy_cost"]), rel=1e-6)
    assert parts.total == pytest.approx(float(case[f"objective_{which}"]), rel=1e-6)
    # The median is 200 to 5e-6, and so is beta 1200.
    assert (parts.transport, parts.statistics, parts.confidence) == pytest.approx(tuple(case[f"parts_{which}"]), rel=1e-5)


@pytest.mark.parametrize("name", ["cat_500", "ship_1300"])
def test_search_of_the_reference_cases(name: str, gadc_case) -> None:
    """No worse than what the published search reached, and no swap of all would help."""
    case = gadc_case(name)
    rows, facts = transport.gadc(case["features"].astype(np.float32), case["ce"], 10, OPTIONS)
    assert len(set(rows.tolist())) == 10
    assert facts["objective"] <= float(case["objective_refined"])
    problem = transport.prepare(case["features"].astype(np.float32), case["ce"], OPTIONS)
    assert transport.objective(problem, rows).total == pytest.approx(facts["objective"], rel=1e-12)
    assert facts["one_swap_optimal"]
    at, generator = transport._swaps(torch.from_numpy(rows)), torch.Generator().manual_seed(0)
    pairs = torch.tensor(list(itertools.product(range(10), sorted(set(range(len(case["ce"]))) - set(rows.tolist())))))
    pairs = pairs[torch.randperm(len(pairs), generator=generator)[:2000]]
    totals = transport._transport(problem, at, pairs, 20) + transport._moments_of(problem, at, pairs)
    assert totals.min() > facts["objective"]


@pytest.mark.parametrize("count", [1, 2, 7, 40])
@pytest.mark.parametrize("epsilon", [0.02, 0.06, 1.0])
@pytest.mark.parametrize("kappa", [1.0, 1.05, 2.0])
def test_objective_is_the_definition(count: int, epsilon: float, kappa: float) -> None:
    y, ce = one_class(50)
    options = replace(OPTIONS, epsilon=epsilon, kappa=kappa)
    rows = np.random.default_rng(1).permutation(50)[:count]
    parts = transport.objective(transport.prepare(y, ce, options), rows)
    assert (parts.transport, parts.statistics, parts.confidence) == pytest.approx(plain_objective(y, ce, rows, options), rel=2e-6)


@pytest.mark.parametrize("epsilon", [0.02, 0.06, 0.5])
def test_many_sets_at_once_are_what_each_is_alone(epsilon: float) -> None:
    y, ce = one_class(60)
    problem = transport.prepare(y, ce, replace(OPTIONS, epsilon=epsilon))
    rows = torch.tensor([3, 50, 17, 20, 41])
    for at in (transport._swaps(rows), transport._insertion(rows), transport._insertion(rows[:0])):
        pairs = torch.tensor([pair for pair in itertools.product(range(len(at.keep)), range(60)) if pair[1] not in at.rows])
        totals = transport._transport(problem, at, pairs, 20) + transport._moments_of(problem, at, pairs)
        alone = [transport.objective(problem, torch.cat([at.rows[at.keep[i]], j[None]])).total for i, j in pairs]
        assert totals.tolist() == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_screens_rank_as_the_exact_objective_does(seed: int) -> None:
    """The best pairs are among a screen's first; tangents bound the moments, exactly so for one open set."""
    y, ce = one_class(80, seed=seed)
    problem = transport.prepare(y, ce, OPTIONS)
    rows = transport._insert(problem, 6)
    for at in (transport._swaps(rows), transport._insertion(rows)):
        pairs = torch.tensor([pair for pair in itertools.product(range(len(at.keep)), range(80)) if pair[1] not in rows])
        index, candidate = pairs.T
        moments = transport._moments_of(problem, at, pairs)
        exact = transport._transport(problem, at, pairs, 20) + moments
        tangents = transport._moments(problem, at)[index, candidate]
        assert (tangents - moments).max() < 1e-4 * moments.max()
        if len(at.keep) == 1:
            assert tangents.numpy() == pytest.approx(moments.numpy(), rel=1e-3)
        prices = transport._prices(problem, at)
        fixed, u = transport._fixed(problem, at, prices)
        warm = transport._transport(problem, at, pairs, 2, (prices, u)) + moments
        best = exact.topk(5, largest=False).indices
        assert torch.isin(best, warm.topk(20, largest=False).indices).all()
        assert torch.isin(best[:1], (fixed[index, candidate] + tangents).topk(40, largest=False).indices).all()


@pytest.mark.parametrize(("size", "width", "count", "seeds"), [(70, 12, 5, 6), (464, 15, 21, 1)])
def test_what_is_said_to_be_an_optimum_is_one(size: int, width: int, count: int, seeds: int) -> None:
    """Every swap by the evaluator for many sets, which another test compares with the one for one set."""
    for seed in range(seeds):
        y, ce = one_class(size, width, seed)
        rows, facts = transport.gadc(y, ce, count, OPTIONS)
        assert facts["one_swap_optimal"]
        problem = transport.prepare(y, ce, OPTIONS)
        at = transport._swaps(torch.from_numpy(rows))
        others = np.setdiff1d(np.arange(size), rows)
        pairs = torch.tensor([[place, other] for place in range(count) for other in others])
        totals = transport._transport(problem, at, pairs, OPTIONS.iterations) + transport._moments_of(problem, at, pairs)
        assert float(totals.min()) >= facts["objective"] * (1 - 1e-5)


def test_an_optimum_is_not_claimed_where_not_all_was_looked_at() -> None:
    y, ce = one_class(70, 12, 0)
    _, facts = transport.gadc(y, ce, 5, replace(OPTIONS, verify=200))
    assert not facts["one_swap_optimal"]


@pytest.mark.parametrize(("size", "count", "seed"), [(14, 3, 0), (20, 4, 1), (24, 2, 2), (12, 6, 3), (20, 3, 4)])
def test_search_is_as_good_as_the_plain_one(size: int, count: int, seed: int) -> None:
    y, ce = one_class(size, 4, seed)
    rows, facts = transport.gadc(y, ce, count, OPTIONS)
    assert sum(plain_objective(y, ce, rows)) == pytest.approx(facts["objective"], rel=1e-5)
    assert facts["objective"] <= 1.001 * plain_search(y, ce, count)[1]


def test_greedy_weighs_confidence_as_the_swaps_do() -> None:
    """The published greedy adds beta ce of the candidate, which at a set of k weighs it k times more than its mean does."""
    y, _ = one_class(40, 4, 5)
    ce = np.random.default_rng(5).exponential(size=40).astype(np.float32) * 0.2
    problem = transport.prepare(y, ce, OPTIONS)
    mean, published = [], []
    for _ in range(8):
        without = {j: sum(plain_objective(y, ce, [*mean, j])) for j in range(40) if j not in mean}
        mean.append(min(without, key=without.__getitem__))
        other = {j: sum(plain_objective(y, ce, [*published, j])[:2]) + problem.beta * ce[j] for j in range(40) if j not in published}
        published.append(min(other, key=other.__getitem__))
    assert transport._insert(problem, 8).tolist() == mean
    assert mean != published


@given(count=st.integers(1, 8), extra=st.integers(3, 20), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_distinct_rows_and_the_same_ones_in_any_order_and_scale(count: int, extra: int, seed: int) -> None:
    y, ce = one_class(count + extra, 4, seed)
    rows, _ = transport.gadc(y, ce, count, OPTIONS)
    assert rows.dtype == np.int64 and len(set(rows.tolist())) == count and rows.min() >= 0 and rows.max() < len(y)
    order = np.random.default_rng(seed).permutation(len(y))
    assert set(order[transport.gadc(y[order], ce[order], count, OPTIONS)[0]].tolist()) == set(rows.tolist())
    assert transport.gadc(100 * y, ce, count, OPTIONS)[0].tolist() == rows.tolist()


def test_every_image_of_a_class() -> None:
    y, ce = one_class(30)
    assert transport.gadc(y, ce, 30, replace(OPTIONS, max_class=10))[0].tolist() == [*range(30)]
    for count in (0, 31):
        with pytest.raises(UserError, match="30 would do"):
            transport.gadc(y, ce, count, OPTIONS)


def test_tiny_classes_and_identical_images() -> None:
    two = np.float32([[0, 1], [1, 0]])
    assert transport.gadc(two[:1], None, 1, OPTIONS)[0].tolist() == [0]
    assert transport.gadc(two, None, 1, OPTIONS)[0].tolist() == [0]
    rows, facts = transport.gadc(np.ones((6, 3), np.float32), None, 3, OPTIONS)
    assert rows.tolist() == [0, 1, 2] and facts["objective"] == 0 and facts["median"] == 0
    y, ce = one_class(20)
    twice = np.arange(40) % 20
    rows, facts = transport.gadc(y[twice], ce[twice], 6, OPTIONS)
    assert len(set(rows.tolist())) == 6 and np.isfinite(facts["objective"])
    assert all(row < 20 or row - 20 in rows for row in rows)  # of two equal images the lower one first


def test_tiny_epsilon_gives_numbers_or_an_error() -> None:
    """Far beyond what an exponential holds the iterations run on logarithms; where they ship nothing, that is said."""
    y, ce = one_class(40)
    for epsilon, domain in ((0.05, "logarithms"), (0.3, "float64"), (1.0, "float32")):
        options = replace(OPTIONS, epsilon_absolute=epsilon, iterations=60, swap_rounds=1, verify=0)
        problem = transport.prepare(y, ce, options)
        rows, facts = transport.gadc(y, ce, 2, options)
        assert facts["domain"] == domain
        assert all(np.isfinite(facts[name]) for name in ("transport", "statistics", "confidence"))
        assert facts["shipped"] > 0.9
        logarithms, _ = transport._logarithmic(problem, torch.from_numpy(rows))
        assert transport.objective(problem, rows).transport == pytest.approx(logarithms, rel=1e-9)
        # One-sided transport cannot cost less than every image's share of the nearest ones.
        nearest = np.sort(np.square(y[rows][:, None].astype(np.float64) - y).sum(2), axis=1)[:, : int(40 / (2 * 1.05))]
        assert facts["transport"] > 0.9 * nearest.mean()
    with pytest.raises(UserError, match=r"ship 5\.\d% of the mass.*select.transport.epsilon"):
        transport.gadc(y, ce, 2, replace(OPTIONS, epsilon_absolute=1e-6))


def test_logarithms_equal_the_kernel() -> None:
    y, ce = one_class(60)
    problem = transport.prepare(y, ce, OPTIONS)
    rows = torch.tensor([1, 8, 30])
    assert transport._linear(problem, rows) == pytest.approx(transport._logarithmic(problem, rows), rel=1e-9)
    slow = replace(problem, kernel=None)
    assert transport._insert(slow, 5).tolist() == transport._insert(problem, 5).tolist()
    fast = transport._fixed(problem, at := transport._swaps(rows), transport._prices(problem, at))[0]
    assert transport._fixed(slow, at, transport._prices(slow, at))[0].numpy() == pytest.approx(fast.numpy(), rel=1e-4)


def test_what_is_refused() -> None:
    y, ce = one_class(30)
    with pytest.raises(UserError, match=r"7200 bytes.*max_class=20"):
        transport.gadc(y, ce, 3, replace(OPTIONS, max_class=20))
    y[4, 2] = np.nan
    with pytest.raises(UserError, match="features of 1 images are not finite, the first in row 4"):
        transport.gadc(y, ce, 3, OPTIONS)
    for key, value in (("kappa", 0.9), ("epsilon", 0), ("gamma", -1), ("confidence", -1), ("iterations", 0), ("max_class", 0)):
        with pytest.raises(UserError, match=f"select.transport.{key}"):
            from_dict({"select": {"transport": {key: value}}})
