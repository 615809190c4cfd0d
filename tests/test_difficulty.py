"""The difficulty score against its formula, and what it may not depend on."""

import numpy as np
import pytest
import torch

from d2c_ray.models.teachers import Teacher
from d2c_ray.models.transformer import Transformer, TransformerSpec
from d2c_ray.selection import difficulty
from d2c_ray.selection.noise import noise


def teacher(kind: str, path: str = "linear") -> Teacher:
    torch.manual_seed(0)
    network = Transformer(TransformerSpec(kind, 8, 1, 2, 2, 32, 2, 4))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    network.eval().requires_grad_(False)
    return Teacher(kind, 1, 4, torch.device("cpu"), network, network, path=path)


def inputs(count: int, steps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(count, 1, 8, 8, generator=generator)
    draws = np.stack([noise(0, f"key{i}", steps, (1, 8, 8)) for i in range(count)])
    return z, torch.arange(count) % 4, torch.from_numpy(draws)


@pytest.mark.parametrize(("kind", "path"), [("sit", "linear"), ("sit", "cosine"), ("dit", "linear")])
def test_errors_equal_the_formula(kind: str, path: str) -> None:
    """One image and one timestep at a time, written out from the definition."""
    model, (z, label, draws), t = teacher(kind, path), inputs(3, 4), difficulty.timesteps(kind, 4, 0.0, 1.0)
    found = difficulty.errors(model, z, label, draws, t, device_batch=8)
    cumulative = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for i in range(3):
        for j, step in enumerate(t.tolist()):
            eps = draws[i, j][None]
            alpha, sigma = (cumulative[step] ** 0.5, (1 - cumulative[step]) ** 0.5) if kind == "dit" else (1 - step, step)
            if path == "cosine":
                alpha, sigma = np.cos(np.pi / 2 * step), np.sin(np.pi / 2 * step)
            out = model.network(alpha * z[i : i + 1] + sigma * eps, t[j : j + 1], label[i : i + 1])[:, :1]
            target = eps if kind == "dit" else eps - z[i : i + 1]
            if path == "cosine":
                target = np.pi / 2 * (alpha * eps - sigma * z[i : i + 1])
            assert found[i, j].item() == pytest.approx((out - target).square().mean().item(), rel=1e-4)


def test_bits_do_not_depend_on_how_rows_arrive() -> None:
    model, (z, label, draws), t = teacher("sit"), inputs(13, 5), difficulty.timesteps("sit", 5, 0.0, 1.0)
    whole = difficulty.errors(model, z, label, draws, t, device_batch=16)
    for size in (1, 7):
        pieces = [
            difficulty.errors(model, z[i : i + size], label[i : i + size], draws[i : i + size], t, device_batch=16)
            for i in range(0, 13, size)
        ]
        assert torch.equal(torch.cat(pieces), whole)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(2))
    assert torch.equal(difficulty.errors(model, z[order], label[order], draws[order], t, device_batch=16), whole[order])


def test_noise_is_a_function_of_seed_key_and_draw() -> None:
    one = noise(0, "a", 3, (2, 4, 4))
    assert np.array_equal(one, noise(0, "a", 3, (2, 4, 4)))
    assert np.array_equal(one[:2], noise(0, "a", 2, (2, 4, 4)))
    assert not np.allclose(one, noise(0, "b", 3, (2, 4, 4)))
    assert not np.allclose(one, noise(1, "a", 3, (2, 4, 4)))
    assert not np.allclose(one[0], one[1])
    many = noise(0, "c", 200, (4, 16, 16))
    assert abs(many.mean()) < 0.01
    assert abs(many.std() - 1) < 0.01


def test_score_weighs_a_velocity_error_as_a_noise_error() -> None:
    errors, t = np.float32([[1, 1], [4, 0]]), np.array([0.25, 0.75])
    cosine = (2 / np.pi * np.cos(np.pi / 2 * t)) ** 2
    assert difficulty.score(errors, t, "sit", "cosine").tolist() == pytest.approx([cosine.mean(), 2 * cosine[0]])
    even, odd = difficulty.half_scores(errors, t, "sit", "cosine")
    assert [*even, *odd] == pytest.approx([cosine[0], 4 * cosine[0], cosine[1], 0.0])
    assert difficulty.score(errors, t, "dit").tolist() == [1.0, 2.0]
    assert difficulty.score(errors, t, "sit").tolist() == pytest.approx([(0.75**2 + 0.25**2) / 2, 4 * 0.75**2 / 2])


def stability(errors: np.ndarray, labels: np.ndarray, t: np.ndarray) -> float | None:
    return difficulty.rank_stability(*difficulty.half_scores(errors, t, "dit"), labels)


def test_rank_stability_of_signal_and_of_noise() -> None:
    rng = np.random.default_rng(0)
    labels, t = np.repeat([0, 1], 400), np.linspace(0, 999, 8)
    signal = rng.random((800, 1)) + 0.02 * rng.random((800, 8))
    assert stability(signal, labels, t) > 0.97
    assert abs(stability(rng.random((800, 8)), labels, t)) < 0.2
    # A difference between the classes alone is no signal within them.
    assert abs(stability(rng.random((800, 8)) + 10 * labels[:, None], labels, t)) < 0.2
    assert stability(np.ones((800, 8)), labels, t) is None
    assert stability(signal[:2], labels[:2], t[:8]) is None


def test_rank_stability_is_spearman_a_class_corrected() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(1)
    labels = rng.choice([-1, 0, 3, 7], 500, p=[0.1, 0.4, 0.498, 0.002])
    even, odd = rng.random(500).astype(np.float32), rng.random(500).astype(np.float32)
    odd = np.round(odd + even, 1).astype(np.float32)  # with ties
    sizes = {label: (labels == label).sum() for label in (-1, 0, 3, 7) if (labels == label).sum() >= 3}
    each = [spearmanr(even[labels == label], odd[labels == label]).statistic for label in sizes]
    half = np.average(each, weights=list(sizes.values()))
    assert difficulty.rank_stability(even, odd, labels) == pytest.approx(2 * half / (1 + half), abs=1e-12)


@pytest.mark.parametrize("decimals", [0, 2, 7])
def test_ranks_are_those_of_scipy(decimals: int) -> None:
    from scipy.stats import rankdata

    values = np.random.default_rng(2).normal(size=1000).round(decimals).astype(np.float32)
    assert np.array_equal(difficulty._ranks(values), 2 * rankdata(values))


@pytest.mark.parametrize("kind", ["sit", "dit"])
@pytest.mark.parametrize("device_batch", [3, 8, 64])
def test_bits_are_those_of_one_pair_in_a_padded_batch(kind: str, device_batch: int) -> None:
    """All pairs written out beforehand, cut into batches that a copy of the batch's first pair fills up."""
    model, (z, label, draws), t = teacher(kind), inputs(5, 4), difficulty.timesteps(kind, 4, 0.0, 1.0)
    clean, labels, eps, at = z.repeat_interleave(4, 0), label.repeat_interleave(4), draws.flatten(0, 1), t.repeat(5)
    objective = difficulty.diffusion.objective(kind)
    expected = []
    for pair in range(20):
        first = pair - pair % device_batch
        row = torch.tensor([*range(first, min(first + device_batch, 20))])
        row = torch.cat([row, row[:1].expand(device_batch - len(row))])
        with torch.inference_mode():
            out = model.network(objective.add_noise(clean[row], eps[row], at[row]), at[row], labels[row])[:, :1]
        target = eps[row] if kind == "dit" else eps[row] - clean[row]
        expected.append((out - target).square().flatten(1).mean(1)[pair - first])
    assert torch.equal(difficulty.errors(model, z, label, draws, t, device_batch), torch.stack(expected).reshape(5, 4))


def test_needed_timesteps_inverts_spearman_brown() -> None:
    """A measure of reliability 0.2 a timestep: r_n = n r / (1 + (n - 1) r)."""
    at_8 = 8 * 0.2 / (1 + 7 * 0.2)
    assert difficulty.needed_timesteps(at_8, 8) == 36
    assert pytest.approx(0.9) == 36 * 0.2 / (1 + 35 * 0.2)
    assert difficulty.needed_timesteps(-0.1, 8) is None
