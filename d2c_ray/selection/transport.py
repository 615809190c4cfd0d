"""GADC's selection of m of one class's n images by features: partial optimal transport, moments and confidence.

    minimise over S:  L_OT + 6 (1.25 ||mu_S - mu_T||^2 + sum_d (sd_S - sd_T)^2) + beta mean over S of ce

GADC, arXiv 2606.05883: greedy insertion, then best-improvement 1-swaps. L_OT is one-sided partial transport of the
chosen (1/m each, all shipped) to the class (capacity kappa/n each) over squared distances, with a dummy source of mass
kappa - 1 and cost gamma median(C), by entropic Sinkhorn in exactly `iterations` steps; the cost counts without the
dummy row and without the entropy. beta and epsilon are relative to median(C), the lower median of the class's own
n x n distances, diagonal included: raw features whose distances are in the thousands underflow at a fixed epsilon.

Deviations: the published greedy adds beta ce of the candidate to the mean terms of a set of k, and so weighs it k
times more than the swaps do; here every step minimises the one objective. A round of swaps may accept several.

How it is fast: distances and kernel once; the exact objective of many sets at once, in blocks that stay in cache, and
only of sets that a screen with warm potentials puts in front. What is accepted is decided by `objective`, in float64.

Shapes: n images, d features, r rows chosen so far, m after the choice, g sets with a place open, p (set, candidate) pairs.
"""

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2c_ray.config import TransportConfig
from d2c_ray.errors import UserError

FLOAT32_RANGE, FLOAT64_RANGE = 60.0, 200.0  # largest C/epsilon whose kernel and potentials fit; above: log domain
POOL, FINALISTS = 64, 4  # insertions evaluated exactly, and in float64
WARM_ITERATIONS = 2
SLOW = 1024  # sets evaluated on logarithms at most
MISSES = 8  # finalists in a row that do not help any more end a round
SHIPPED = 0.5  # share of the mass below which a plan is not the one asked for
FEW = 32  # images of a class in which the iterations can hardly do better
GAIN = 1e-9  # relative; less is rounding


@dataclass(frozen=True)
class Problem:
    """One class, ready to be searched."""

    y: Tensor  # n x d float64, centred on the class mean
    y32: Tensor  # n x d float32, the same for screens
    sd: Tensor  # d float64, of the class
    ce: Tensor  # n float64
    cost: Tensor  # n x n float32 squared distances
    kernel: Tensor | None  # n x n exp(-cost / epsilon); None: outside of what numbers can hold
    median: float
    epsilon: float
    dummy: float  # cost of the dummy row
    beta: float
    options: TransportConfig

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Parts:
    """The objective's three terms, weighted; lower is better."""

    transport: float
    statistics: float
    confidence: float
    shipped: float  # share of the sources' mass that arrives; 1 where the iterations converged

    @property
    def total(self) -> float:
        return self.transport + self.statistics + self.confidence


def gadc(
    features: np.ndarray, ce: np.ndarray | None, count: int, options: TransportConfig, device: str = "cpu"
) -> tuple[np.ndarray, dict[str, Any]]:
    """`count` rows of one class in order of choice, and what is worth keeping about the search.

    Ties go to the lower row, so callers give rows in sample_id order. A count of all rows needs no search and no
    distances, and its facts hold no objective.

    Args:
        features: n x d, of a frozen network. ce: n, the cross entropy of a classifier; None leaves the term out.

    Returns:
        int64 rows, and facts: transport, statistics, confidence, objective, greedy_objective, shipped, epsilon, median,
        domain (of the iterations), swaps, rounds, seconds, and one_swap_optimal: at the end every swap was evaluated and
        none helped. That is done up to options.verify swaps; of more, screens pick those that may help.

    Raises:
        UserError: numbers that are not finite, a count outside of 1 to n, a class above options.max_class, an epsilon so
            small that the iterations do not ship the mass.
    """
    started = time.perf_counter()
    if not 1 <= count <= len(features):
        raise UserError(f"{count} of {len(features)} images cannot be chosen; 1 to {len(features)} would do.")
    if count == len(features):
        return np.arange(count), {"swaps": 0, "rounds": 0, "one_swap_optimal": True, "seconds": time.perf_counter() - started}
    problem = prepare(features, ce, options, device)
    rows = _insert(problem, count)
    greedy = objective(problem, rows)
    if greedy.shipped < SHIPPED and len(problem) >= FEW:
        raise UserError(
            f"{options.iterations} Sinkhorn iterations at epsilon {problem.epsilon:.3g} ship {greedy.shipped:.1%} of the mass over distances up to "
            f"{float(problem.cost.max()):.3g}, so the transport cost means nothing. A larger select.transport.epsilon (or epsilon_absolute), or more iterations, would do."
        )
    rows, found = _swap(problem, rows, greedy)
    rows = _lowest_of_equals(problem, rows)
    parts = objective(problem, rows)
    facts = asdict(parts) | {"objective": parts.total, "greedy_objective": greedy.total} | found
    facts |= {"epsilon": problem.epsilon, "median": problem.median, "domain": _domain(problem)}
    return rows.cpu().numpy(), facts | {"seconds": time.perf_counter() - started}


def prepare(features: np.ndarray | Tensor, ce: np.ndarray | Tensor | None, options: TransportConfig, device: str = "cpu") -> Problem:
    """Distances, kernel and moments of one class, n x d.

    Where the median distance is 0 (one or two images, or mostly duplicates) the mean stands in for it, then 1.
    """
    n = len(features)
    if n > options.max_class:
        raise UserError(
            f"a class of {n} images needs {8 * n * n / 2**30:.1f} GiB for its distances and kernel, {8 * n * n} bytes; "
            f"select.transport.max_class={options.max_class} allows {8 * options.max_class**2 / 2**30:.1f} GiB. "
            "Raise it where the memory is there, or limit the class."
        )
    y = torch.as_tensor(features).to(device).double()
    losses = torch.zeros(n, dtype=torch.float64, device=device) if ce is None else torch.as_tensor(ce).to(device).double()
    if y.ndim != 2 or losses.shape != (n,):
        raise ValueError(f"features of shape {tuple(y.shape)} and ce of {tuple(losses.shape)}: n x d and n are wanted")
    for name, values in (("features", y), ("cross entropies", losses)):
        broken = (~torch.isfinite(values.reshape(n, -1))).any(1)
        if broken.any():
            raise UserError(f"the {name} of {int(broken.sum())} images are not finite, the first in row {int(broken.nonzero()[0])}.")
    y = y - y.mean(0)
    sd = y.std(0) if n > 1 else torch.zeros_like(y[0])
    cost = squared_distances(y)
    median = float(cost.median())  # the lower of two middle values
    scale = median or float(cost.mean(dtype=torch.float64)) or 1.0
    epsilon = options.epsilon_absolute or options.epsilon * scale
    reach = float(cost.max()) / epsilon
    kernel = None
    if reach <= FLOAT64_RANGE:
        kernel = (cost if reach <= FLOAT32_RANGE else cost.double()).div(-epsilon).exp_()
    return Problem(y, y.float(), sd, losses, cost, kernel, median, epsilon, options.gamma * scale, options.confidence * scale, options)


def squared_distances(y: Tensor) -> Tensor:
    """n x n float32 of n x d float64 rows, the diagonal 0; products in float64 so that they hardly depend on row order."""
    norms = y.square().sum(1)
    cost = torch.empty(len(y), len(y), dtype=torch.float32, device=y.device)
    for start in range(0, len(y), 1024):
        block = slice(start, start + 1024)
        cost[block] = torch.addmm(norms, y[block], y.T, alpha=-2).add_(norms[block, None]).clamp_(min=0)
    return cost.fill_diagonal_(0)


def objective(problem: Problem, rows: Tensor | np.ndarray) -> Parts:
    """The one evaluator: the objective's terms for a set of rows, in float64.

    Iterations start from u = v = 1 and update u first; where the kernel would underflow they run on logarithms.
    """
    rows = torch.as_tensor(rows, device=problem.cost.device)
    transport, shipped = _linear(problem, rows) if problem.kernel is not None else _logarithmic(problem, rows)
    chosen = problem.y[rows]
    sd = chosen.std(0) if len(rows) > 1 else torch.zeros_like(problem.sd)  # one image has no spread
    weights = problem.options
    moments = weights.mean_weight * chosen.mean(0).square().sum() + (sd - problem.sd).square().sum()
    return Parts(transport, weights.statistics * float(moments), problem.beta * float(problem.ce[rows].mean()), shipped)


def _linear(problem: Problem, rows: Tensor) -> tuple[float, float]:
    cost = problem.cost[rows].double()  # m x n
    kernel = cost.div(-problem.epsilon).exp_()
    # v is in units of kappa/n. The dummy's row of the kernel is one number, which cancels: 1.
    share, dummy = _masses(problem, len(rows), 0)
    v, u = torch.ones_like(cost[0]), cost[:, 0]
    for _ in range(problem.options.iterations):
        u = share / (kernel @ v)
        v = (u @ kernel).add_(dummy / v.sum()).reciprocal_()
    unit = problem.options.kappa / len(problem)
    shipped = float(u @ (kernel @ v)) * unit
    return float(u @ (kernel.mul_(cost) @ v)) * unit, shipped


def _logarithmic(problem: Problem, rows: Tensor) -> tuple[float, float]:
    cost = problem.cost[rows].double()  # m x n
    logits = cost / -problem.epsilon
    share, dummy = _masses(problem, len(rows), 0)
    v, u = torch.zeros_like(cost[0]), cost[:, 0]  # logarithms
    for _ in range(problem.options.iterations):
        u = math.log(share) - (logits + v).logsumexp(1)
        reserve = (math.log(dummy) if dummy else -math.inf) - v.logsumexp(0)
        v = -torch.logaddexp((logits + u[:, None]).logsumexp(0), reserve)
    unit = problem.options.kappa / len(problem)
    plan = (logits + u[:, None] + v).exp_()
    return float((plan * cost).sum()) * unit, float(plan.sum()) * unit


def _masses(problem: Problem, count: int, places: int) -> tuple[float, float]:
    """Source masses in units of kappa/n: of a chosen row, and of the dummy, which holds `places` open ones as well."""
    kappa, n = problem.options.kappa, len(problem)
    return n / (kappa * count), n / kappa * (kappa - 1 + places / count)


def _domain(problem: Problem) -> str:
    return "logarithms" if problem.kernel is None else str(problem.kernel.dtype).removeprefix("torch.")


# ---- many sets at once ----


@dataclass(frozen=True)
class _Open:
    """g sets of m - 1 rows with one place open: the rows so far alone (insertion), or without each of them in turn (swaps)."""

    rows: Tensor  # r
    keep: Tensor  # g x r bool
    size: int  # m

    def sets(self) -> list[Tensor]:
        return [self.rows[kept] for kept in self.keep]


def _insertion(rows: Tensor) -> _Open:
    return _Open(rows, torch.ones(1, len(rows), dtype=torch.bool, device=rows.device), len(rows) + 1)


def _swaps(rows: Tensor) -> _Open:
    return _Open(rows, ~torch.eye(len(rows), dtype=torch.bool, device=rows.device), len(rows))


def _means_and_squares(problem: Problem, at: _Open) -> tuple[Tensor, Tensor]:
    """Of every open set's m - 1 rows, g x d float64: the mean, and the sum of squares about it."""
    have, keep = problem.y[at.rows], at.keep.double()
    mean = keep @ have / max(at.size - 1, 1)
    squares = keep @ have.square() - max(at.size - 1, 1) * mean.square()
    return mean, squares.clamp_(min=0)


def _moments(problem: Problem, at: _Open) -> Tensor:
    """Statistics and confidence of every open set with every candidate, g x n float32, from below.

    With a new row y_j the variance is x = squares / (m - 1) + (y_j - mean)^2 / m, and only the sum of sd_T sqrt(x) needs
    every element of every pair. The root lies under its tangents: sqrt(x) <= (x + x0) / (2 sqrt(x0)), which at an x0 of
    the candidate alone is two matrix products. With one open set x0 is x and nothing is lost.
    """
    options, m, y = problem.options, at.size, problem.y32
    mean, squares = _means_and_squares(problem, at)
    centre = mean.mean(0)  # about which all is small
    off = (mean - centre).float()  # g x d
    away = torch.empty(len(off), len(y), device=y.device)  # ||y_j - mean||^2
    roots = torch.zeros_like(away)  # sum of sd_T sqrt(x)
    variance = (squares / max(m - 1, 1)).float()
    fixed, sd = variance.mean(0) + off.square().mean(0) / m, problem.sd.float()
    least = 1e-6 * sd.square() + torch.finfo(torch.float32).tiny
    step = _block(y, y.shape[1])
    for start in range(0, len(y), step):
        block = y[start : start + step] - centre.float()
        square = block.square()
        away[:, start : start + step] = off.square().sum(1, keepdim=True) - 2 * off @ block.T + square.sum(1)
        x0 = torch.maximum(torch.add(fixed, square, alpha=1 / m), least)
        weight = sd * x0.rsqrt() / 2
        constant = (x0.add_(square, alpha=1 / m) * weight).sum(1)
        # Both products of one: the linear terms of all sets.
        roots[:, start : start + step] = constant + (variance + off.square() / m) @ weight.T - (2 / m * off) @ weight.mul_(block).T
    along = (y @ mean.float().T).T  # g x n
    norm = mean.float().square().sum(1, keepdim=True)
    moved = norm + 2 * (along - norm) / m + away / m**2  # of the new mean
    spread = torch.full_like(moved, float(problem.sd.square().sum()))
    if m > 1:
        spread += variance.sum(1, keepdim=True) + away / m - 2 * roots
    ce = (at.keep.double() @ problem.ce[at.rows])[:, None] + problem.ce
    return options.statistics * (options.mean_weight * moved + spread) + (problem.beta / m * ce).float()


def _moments_of(problem: Problem, at: _Open, pairs: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same of p pairs, exact but for rounding."""
    options, m = problem.options, at.size
    y, sd = (problem.y, problem.sd) if dtype == torch.float64 else (problem.y32, problem.sd.float())
    means, squares = (values.to(dtype) for values in _means_and_squares(problem, at))
    losses = at.keep.double() @ problem.ce[at.rows]
    found = []
    for chunk in pairs.split(_block(y, y.shape[1])):
        index, candidate = chunk.T
        mean = means[index]
        step = y[candidate].sub_(mean)
        moved = torch.add(mean, step, alpha=1 / m).square().sum(1)
        root = torch.addcmul(squares[index].div_(max(m - 1, 1)), step, step, value=1 / m).sqrt_() if m > 1 else torch.zeros_like(step)
        spread = root.sub_(sd).square_().sum(1)
        ce = (losses[index] + problem.ce[candidate]) / m
        found.append(options.statistics * (options.mean_weight * moved + spread) + problem.beta * ce)
    return torch.cat(found)


def _prices(problem: Problem, at: _Open) -> Tensor:
    """Potentials v of every open set, the dummy holding the open place: g x n, logarithms where there is no kernel."""
    share, dummy = _masses(problem, at.size, 1)
    if problem.kernel is None:
        logits, found = problem.cost[at.rows].double() / -problem.epsilon, []
        for kept in at.keep:
            v = torch.zeros(len(problem), dtype=torch.float64, device=logits.device)
            for _ in range(problem.options.iterations):
                u = math.log(share) - (logits[kept] + v).logsumexp(1)
                v = -torch.logaddexp((logits[kept] + u[:, None]).logsumexp(0), math.log(dummy) - v.logsumexp(0))
            found.append(v)
        return torch.stack(found)
    kernel = problem.kernel[at.rows]  # r x n
    masses = at.keep.to(kernel.dtype) * share
    v = torch.ones(len(masses), len(problem), dtype=kernel.dtype, device=kernel.device)
    for _ in range(problem.options.iterations):
        u = masses / (v @ kernel.T)
        v = torch.addmm(dummy / v.sum(1, keepdim=True), u, kernel).reciprocal_()
    return v


def _fixed(problem: Problem, at: _Open, v: Tensor) -> tuple[Tensor, Tensor]:
    """Transport cost of every open set with every candidate at fixed potentials, and the candidate's u: g x n each.

    A row pays its softmin average. A candidate's own column costs it nothing and would take all of an outlier, whose
    iterations then take long to find the column's capacity; so that column takes its capacity at most from the start.
    """
    share, _ = _masses(problem, at.size, 0)
    found = torch.empty_like(v)  # of the candidates
    u = torch.empty_like(v)
    have = torch.empty_like(v)  # of rows that are in the set, at their own equilibrium
    step = _block(problem.cost, len(problem))
    for start in range(0, len(problem), step):
        block = slice(start, start + step)
        cost = problem.cost[block]
        if problem.kernel is None:
            logits = (cost / -problem.epsilon).double()
            logits.diagonal(start).fill_(-torch.inf)
            for index, logarithms in enumerate(v):
                others = (logits + logarithms).logsumexp(1)
                pays = ((logits + logarithms - others[:, None]).exp_() * cost).sum(1)
                stays = torch.sigmoid(logarithms[block] - others)
                found[index, block], have[index, block] = (1 - stays.clamp(max=1 / share)) * pays, (1 - stays) * pays
        else:
            kernel = problem.kernel[block].clone()
            kernel.diagonal(start).fill_(0)
            others = v @ kernel.T
            pays = v @ kernel.mul_(cost).T / others
            stays = v[:, block] / (v[:, block] + others)
            ships = 1 - stays.clamp(max=1 / share)
            found[:, block], have[:, block], u[:, block] = ships * pays, (1 - stays) * pays, share * ships / others
    return (found + (have[:, at.rows] * at.keep).sum(1, keepdim=True)) / at.size, u


def _transport(problem: Problem, at: _Open, pairs: Tensor, iterations: int, start: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """L_OT of p pairs (open set, candidate), p x 2 -> p float64; from v = 1, or from each open set's v and candidates' u.

    Pairs share all rows but one, so an iteration is two matrix products for a block of pairs, and a row of their own.
    """
    if problem.kernel is None:
        sets = [torch.cat([at.rows[at.keep[index]], candidate[None]]) for index, candidate in pairs]
        return torch.tensor([_logarithmic(problem, rows)[0] for rows in sets], dtype=torch.float64, device=pairs.device)
    kernel = torch.cat([problem.kernel[at.rows], torch.ones_like(problem.kernel[:1])])  # r + 1 x n, the dummy last
    weighted = kernel[:-1] * problem.cost[at.rows]
    share, dummy = _masses(problem, at.size, 0)
    masses = torch.cat([at.keep.T.to(kernel.dtype) * share, kernel.new_full((1, len(at.keep)), dummy)])  # r + 1 x g
    found = []
    for chunk in pairs.split(_block(kernel, len(problem))):
        index, candidate = chunk.T
        mass, own = masses[:, index], problem.kernel[candidate]
        v, work = torch.ones_like(own), torch.empty_like(own)
        if start is not None:
            v = start[0][index]
            v.scatter_(1, candidate[:, None], 1 / (1 / start[0][index, candidate] + start[1][index, candidate])[:, None])
        for _ in range(iterations):
            u_own = share / torch.mul(v, own, out=work).sum(1, keepdim=True)
            u = mass / (kernel @ v.T)  # this order: other layouts of narrow products take three times as long
            torch.mul(own, u_own, out=v).addmm_(u.T, kernel).reciprocal_()
        ships = torch.mul(v, own, out=work).mul_(problem.cost[candidate]).sum(1) * u_own[:, 0]
        found.append((weighted @ v.T).mul_(u[:-1]).sum(0).add_(ships).double())
    return torch.cat(found) * problem.options.kappa / len(problem)


def _block(like: Tensor, width: int) -> int:
    """Rows of a block: what stays in a core's cache, or keeps an accelerator busy."""
    numbers = 2**16 if like.device.type == "cpu" else 2**26
    return max(16, numbers * 4 // like.element_size() // width)


# ---- the search ----


def _insert(problem: Problem, count: int) -> Tensor:
    """Greedy insertion: the row with the lowest objective of the set with it, `count` times."""
    rows = torch.empty(0, dtype=torch.int64, device=problem.cost.device)
    for _ in range(count):
        at = _insertion(rows)
        pairs = _promising(problem, at, 8 * POOL, POOL).pairs
        sets = [torch.cat([rows, candidate[None]]) for _, candidate in pairs[:FINALISTS]]
        values = [objective(problem, chosen).total for chosen in sets]
        least = min(values)
        # Rounding must not decide between equals: the lowest row of those.
        ties = [chosen for chosen, value in zip(sets, values, strict=True) if value <= least + abs(least) * GAIN]
        rows = min(ties, key=lambda chosen: int(chosen[-1]))
    return rows


def _swap(problem: Problem, rows: Tensor, parts: Parts) -> tuple[Tensor, dict[str, Any]]:
    """1-swaps until none helps, or `swap_rounds`. A round takes the best swap and then others that still help."""
    current, swaps, rounds, optimal = parts.total, 0, 0, False
    pool = POOL + len(rows)
    looks = [(8 * pool, pool), (64 * pool, 8 * pool), (problem.options.verify, problem.options.verify)]
    looks = looks[:1] + [look for look in looks[1:] if looks[0][0] < look[0] <= problem.options.verify]
    while rounds < problem.options.swap_rounds and not optimal:
        rounds += 1
        taken, above = 0, 0.0
        for kept, exact in looks:
            found = _promising(problem, _swaps(rows), kept, exact, current, above)
            above = max(above, found.above)
            rows, current, taken = _accept(problem, rows, current, found)
            optimal = found.whole and not taken
            if taken:
                break
        swaps += taken
        if not taken:
            break
    return rows, {"swaps": swaps, "rounds": rounds, "one_swap_optimal": optimal}


@dataclass(frozen=True)
class _Found:
    """(open set, candidate) pairs, p x 2, with their objectives, the lowest first, ties by row."""

    pairs: Tensor
    totals: Tensor
    whole: bool  # no pair was left out
    above: float  # how far a screen lay above the truth at most


def _accept(problem: Problem, rows: Tensor, current: float, found: _Found) -> tuple[Tensor, float, int]:
    """The set after the best swap and those behind it that still help, its objective, and how many they were."""
    rows, before, touched, taken, misses = rows.clone(), current, set(), 0, 0
    for (place, candidate), total in zip(found.pairs.tolist(), found.totals.tolist(), strict=True):
        if total >= before or misses == MISSES:
            break  # what helped the set before it changed may not any more, but what did not will not
        if place in touched or candidate in rows:
            continue
        changed = rows.clone()
        changed[place] = candidate
        value = objective(problem, changed).total
        if value < current - abs(current) * GAIN:
            rows, current, taken, misses = changed, value, taken + 1, 0
            touched.add(place)
        else:
            misses += 1
    return rows, current, taken


def _promising(problem: Problem, at: _Open, kept: int, pool: int, bound: float = math.inf, slack: float = 0.0) -> _Found:
    """The pairs with the lowest objectives, by screens of falling speed and rising truth.

    Fixed potentials for all pairs, a few warm iterations for the best `kept`, the exact number for the best `pool`.
    A screen mostly comes from below: the open place starts too cheap and gets dearer with the iterations. So one that
    is above `bound` by more than `slack`, twice what was seen so far, ends its pair's case.
    """
    sets, n = len(at.keep), len(problem)
    every = sets * (n - len(at.rows))
    exhaustive = every <= pool
    bound = math.inf if exhaustive else bound + 2 * slack
    moments = _moments(problem, at)
    prices = _prices(problem, at)
    fixed, u = _fixed(problem, at, prices)
    guess = (fixed + moments).index_fill_(1, at.rows, torch.inf).flatten()
    passed = min(int((guess < bound).sum()), every)
    best = guess.topk(min(kept, passed), largest=False).indices
    pairs = torch.stack([best // n, best % n], 1)
    if problem.kernel is not None and not exhaustive:
        iterations = WARM_ITERATIONS if pool < kept else 2 * WARM_ITERATIONS
        warm = _transport(problem, at, pairs, iterations, (prices, u)) + _moments_of(problem, at, pairs, torch.float32)
        passed = int((warm < bound).sum())
        pairs = pairs[warm.topk(min(pool, passed), largest=False).indices]
    elif problem.kernel is None:
        pairs = pairs[: min(pool, SLOW)]
    pairs = pairs[torch.argsort(pairs[:, 1] * sets + pairs[:, 0])]
    transport = _transport(problem, at, pairs, problem.options.iterations)
    above = float((fixed[pairs[:, 0], pairs[:, 1]] - transport).max()) if len(pairs) else 0.0
    totals = transport + _moments_of(problem, at, pairs)
    order = totals.argsort(stable=True)
    return _Found(pairs[order], totals[order], len(pairs) == every, max(above, 0.0))


def _lowest_of_equals(problem: Problem, rows: Tensor) -> Tensor:
    """Rows with the same features and cross entropy are one to the objective: the lowest of them are taken, in order."""
    keys = [row.tobytes() for row in torch.cat([problem.y, problem.ce[:, None]], 1).cpu().numpy()]
    if len(set(keys)) == len(keys):
        return rows
    equals: dict[bytes, list[int]] = {}
    for row, key in enumerate(keys):
        equals.setdefault(key, []).append(row)
    return torch.tensor([equals[keys[row]].pop(0) for row in rows.tolist()], device=rows.device)
