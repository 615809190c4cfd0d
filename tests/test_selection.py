"""Quotas, ranks and selectors."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2c_ray import schema
from d2c_ray.config import ResourcesConfig, SelectConfig
from d2c_ray.data import score_parts, tables
from d2c_ray.errors import UserError
from d2c_ray.selection import rank, stratified
from d2c_ray.selection.baselines import SELECTORS
from d2c_ray.selection.draw import random_keys
from d2c_ray.selection.interval import interval_ranks, nominal_fractions
from d2c_ray.stages.select import select


def one_class(size: int, count: int, k: int = 0, f: float = 0.0) -> np.ndarray:
    return interval_ranks(np.array([size]), np.array([count]), k, f)


def test_published_settings() -> None:
    """ImageNet's 1,300 images a class: n=10 k=96, n=50 k=16, n=100 k=10, and the fractions the paper names."""
    for count, k, nominal, deepest in ((10, 96, 0.74, 0.665), (50, 16, 0.62, 0.603), (100, 10, 0.77, 0.762)):
        ranks = one_class(1300, count, k=k)
        assert ranks.tolist() == list(range(0, count * k, k))
        assert nominal_fractions(np.array([1300]), np.array([count]), k=k)[0] == pytest.approx(nominal, abs=0.005)
        assert ranks[-1] / 1300 == pytest.approx(deepest, abs=0.001)


def test_k_one_is_easiest_and_f_one_spans_the_class() -> None:
    assert one_class(50, 7, k=1).tolist() == list(range(7))
    for size, count in ((50, 7), (1300, 10), (13, 13), (100, 3)):
        assert one_class(size, count, f=1.0)[-1] == (count - 1) * size // count


def test_f_is_exact_where_floats_are_not() -> None:
    assert one_class(10, 7, f=0.7).tolist() == [0, 1, 2, 3, 4, 5, 6]
    for size, count, f in ((1000, 3, 0.3), (170, 30, 0.7), (1001, 100, 0.1), (10, 1, 0.1)):
        assert one_class(size, count, f=f).tolist() == [int(Fraction(str(f)) * i * size / count) for i in range(count)]


@pytest.mark.parametrize(
    ("size", "count", "expected"), [(20, 4, [0, 6, 12, 18]), (5, 5, [0, 1, 2, 3, 4]), (5, 1, [0]), (8, 5, [0, 1, 2, 3, 4])]
)
def test_a_class_too_small_for_the_stride_gets_the_largest_that_fits(size: int, count: int, expected: list[int]) -> None:
    assert one_class(size, count, k=10).tolist() == expected
    assert one_class(size, count, f=0.05).tolist() == expected


def test_interval_never_repeats_or_leaves_the_class() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        size = int(rng.integers(1, 200))
        count = int(rng.integers(1, size + 1))
        options = {"k": int(rng.integers(1, 60))} if rng.random() < 0.5 else {"f": round(float(rng.uniform(0.01, 1)), 3)}
        ranks = one_class(size, count, **options)
        assert len(ranks) == count
        assert (np.diff(ranks) > 0).all()
        assert ranks[0] >= 0
        assert ranks[-1] < size


def test_interval_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="quota of 6"):
        one_class(5, 6, k=1)
    with pytest.raises(ValueError, match="exactly one"):
        one_class(5, 2, k=1, f=0.5)


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


def test_a_million_classes() -> None:
    """Large ones, small ones, and one that gives back what the small ones got too much of."""
    sizes = np.random.default_rng(3).integers(0, 40, 1_000_000)
    sizes[7] = 5_000_000
    for balance in ("equal", "proportional"):
        budget = 2_000_000
        quotas = rank.quotas(sizes, budget, balance)
        assert quotas.sum() == budget and (quotas <= sizes).all() and (quotas[sizes > 0] >= 1).all()
        for stride in ({"f": 0.75}, {"k": 3}):
            ranks = interval_ranks(sizes, quotas, **stride)
            for label in (0, 7, 8, 999_999):
                mine = slice(quotas[:label].sum(), quotas[: label + 1].sum())
                assert np.array_equal(ranks[mine], one_class(int(sizes[label]), int(quotas[label]), **stride))


def test_shares_of_many_digits_are_exact_too() -> None:
    f, sizes, quotas = 0.12345678901234567, np.array([10**9, 9]), np.array([1000, 1])
    expected = [int(Fraction(str(f)) * i * 10**9 / 1000) for i in range(1000)] + [0]
    assert interval_ranks(sizes, quotas, f=f).tolist() == expected


scores_of = st.lists(
    st.tuples(
        st.integers(-2, 3), st.one_of(st.sampled_from([0.0, -0.0, 0.5, -1.0]), st.floats(width=32, allow_nan=False, allow_infinity=False))
    ),
    max_size=60,
)


@given(scores_of, st.randoms(use_true_random=False))
def test_the_order_is_that_of_lexsort(pairs: list[tuple[int, float]], random) -> None:  # type: ignore[no-untyped-def]
    label = np.array([max(label, 0) for label, _ in pairs], np.int32)
    score = np.array([score for _, score in pairs], np.float32)
    ids = np.array(random.sample(range(100), len(pairs)), np.int64) * (1 << 50 if random.random() < 0.5 else 1)
    found = rank.ordered(rank.Partition(label, ids, score))
    expected = np.lexsort((ids, score, label))
    assert found.sample_id.tolist() == ids[expected].tolist()
    assert found.score.tobytes() == score[expected].tobytes()


@pytest.mark.parametrize("high", [1 << 20, 1 << 62])
@pytest.mark.parametrize("spread", [1, 1 << 50])
def test_the_order_where_bits_run_out(high: int, spread: int) -> None:
    rng = np.random.default_rng(9)
    major, minor = (
        rng.choice(rng.integers(0, high, 40), 1000).astype(np.uint64),
        rng.permutation(1000) * spread,
    )
    assert rank.order(major, minor).tolist() == np.lexsort((minor, major)).tolist()


def in_partitions(part: rank.Partition, limit: int, num_classes: int):  # type: ignore[no-untyped-def]
    """Partitions as tasks would hold them, in this process: (spans, each)."""
    sizes = np.bincount(part.label, minlength=num_classes)
    spans, parts = [], []
    for start, stop, count in rank.cut(sizes, limit):
        mine = part.take(np.flatnonzero((part.label >= start) & (part.label < stop)))
        assert len(mine) <= limit or stop == start + 1
        borders = rank.ordered(mine).take(np.arange(1, count) * len(mine) // count)
        piece = rank.pieces(mine, rank.score_key(borders.score), borders.sample_id)
        for number in range(count):
            some = mine.take(np.flatnonzero(piece == number))
            spans.append(rank.Span(start, stop, int((piece < number).sum()), len(some)))
            parts.append(rank.ordered(some))
    return spans, lambda function, arguments: [function(part, *more) for part, more in zip(parts, arguments, strict=True)]


def chosen(part: rank.Partition, options: SelectConfig, quotas: np.ndarray, limit: int = 1 << 30) -> rank.Choice:
    classes = rank.Classes(np.bincount(part.label, minlength=len(quotas)), quotas)
    return SELECTORS[options.selector](classes, *in_partitions(part, limit, len(quotas)), options)


def ids_by_class(choice: rank.Choice, num_classes: int) -> list[list[int]]:
    return [choice.sample_id[choice.label == label].tolist() for label in range(num_classes)]


def reference(part: rank.Partition, options: SelectConfig, quotas: np.ndarray) -> list[list[int]]:
    """The same rules, a class at a time in plain Python."""
    out = []
    for label, quota in enumerate(quotas.tolist()):
        rows = np.flatnonzero(part.label == label)
        members = sorted((float(part.score[row]), int(part.sample_id[row])) for row in rows)
        ids = [sample_id for _, sample_id in members]
        keys = dict(zip(ids, random_keys(options.seed, np.asarray(ids, np.int64)).tolist(), strict=True))
        n = len(ids)
        if options.selector == "random":
            out.append(sorted(ids, key=keys.__getitem__)[:quota])
        elif options.selector == "medium":
            middle = (n - 1) // 2
            away = [0] + [sign * step for step in range(1, n + 1) for sign in (1, -1)]
            out.append([ids[middle + step] for step in away if 0 <= middle + step < n][:quota])
        elif options.selector == "stratified":
            kept = members[: max(quota, n - int(Fraction(str(options.cutoff)) * n))]
            strata: list[list[int]] = [[] for _ in range(options.strata)]
            for score, sample_id in kept:
                low, width = kept[0][0], kept[-1][0] - kept[0][0]
                strata[min(options.strata - 1, int((score - low) * options.strata / width)) if width else 0].append(sample_id)
            left, taken = quota, {}
            waiting = sorted(range(options.strata), key=lambda stratum: (len(strata[stratum]), stratum))
            while waiting:
                stratum = waiting[0]
                taken[stratum] = min(len(strata[stratum]), left // len(waiting))
                left -= taken[stratum]
                waiting = waiting[1:]
            out.append([i for s in range(options.strata) for i in sorted(strata[s], key=keys.__getitem__)[: taken[s]]])
        elif options.selector == "interval":
            out.append([ids[int(row)] for row in one_class(n, quota, options.k, 0.0 if options.k else options.f or 0.75)] if n else [])
        else:
            out.append(ids[:quota] if options.selector == "easiest" else ids[::-1][:quota])
    return out


@st.composite
def cases(draw):  # type: ignore[no-untyped-def]
    """Rows of classes of 0, 1, few and many images with many ties, quotas that the classes can give, options."""
    sizes = draw(st.lists(st.sampled_from([0, 1, 2, 5, 30, 60]), min_size=1, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    label = rng.permutation(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes))
    levels = draw(st.sampled_from([1, 3, 1000]))
    score = (rng.integers(0, levels, len(label)) / 7).astype(np.float32)
    options = SelectConfig(
        selector=draw(st.sampled_from(list(SELECTORS))), k=draw(st.integers(0, 5)), seed=draw(st.integers(0, 3)),
        strata=draw(st.integers(1, 6)), cutoff=draw(st.sampled_from([0.0, 0.3, 0.9])),
    )  # fmt: skip
    quotas = np.array([draw(st.integers(min(1, size), size)) for size in sizes])
    return rank.Partition(label, rng.permutation(len(label) * 3)[: len(label)].astype(np.int64), score), options, quotas


@settings(max_examples=300, deadline=None)
@given(cases())
def test_selectors_against_plain_python(case) -> None:  # type: ignore[no-untyped-def]
    part, options, quotas = case
    if not len(part):
        return
    choice = chosen(part, options, quotas)
    assert ids_by_class(choice, len(quotas)) == reference(part, options, quotas)
    assert choice.position.tolist() == [position for quota in quotas for position in range(quota)]
    whole = rank.ordered(part)
    rank_of = {int(i): int(r - np.searchsorted(whole.label, whole.label[r])) for r, i in enumerate(whole.sample_id)}
    assert [rank_of[i] for i in choice.sample_id.tolist()] == choice.rank.tolist()


@settings(max_examples=300, deadline=None)
@given(cases(), st.integers(1, 40))
def test_partitions_and_the_order_of_rows_change_nothing(case, limit: int) -> None:  # type: ignore[no-untyped-def]
    part, options, quotas = case
    if not len(part):
        return
    one = chosen(part, options, quotas)
    many = chosen(part.take(np.random.default_rng(0).permutation(len(part))), options, quotas, limit)
    for name in ("label", "sample_id", "rank", "position"):
        assert np.array_equal(getattr(one, name), getattr(many, name)), name


def of_one_class(scores: list[float]) -> rank.Partition:
    return rank.Partition(np.zeros(len(scores), np.int32), np.arange(len(scores)), np.float32(scores))


def test_selectors_by_hand() -> None:
    part = of_one_class([5, 3, 4, 0, 2, 1])
    for selector, expected in (("easiest", [3, 5]), ("hardest", [0, 2]), ("medium", [4, 1])):
        assert chosen(part, SelectConfig(selector=selector), np.array([2])).sample_id.tolist() == expected
    assert chosen(part, SelectConfig(k=2), np.array([3])).sample_id.tolist() == [3, 4, 2]
    # The median outwards, to both ends of an even and of an odd class.
    assert chosen(part, SelectConfig(selector="medium"), np.array([6])).rank.tolist() == [2, 3, 1, 4, 0, 5]
    assert chosen(of_one_class([0, 1, 2, 3, 4]), SelectConfig(selector="medium"), np.array([5])).rank.tolist() == [2, 3, 1, 4, 0]


def test_ties_are_broken_by_key() -> None:
    part = rank.Partition(np.zeros(4, np.int32), np.array([3, 1, 2, 0]), np.float32([1, 1, 0, 1]))
    assert chosen(part, SelectConfig(selector="easiest"), np.array([4])).sample_id.tolist() == [2, 0, 1, 3]


def test_random_ignores_scores_and_nests() -> None:
    scores = np.random.default_rng(5).random(40).astype(np.float32)
    options = SelectConfig(selector="random", seed=3)
    small = chosen(of_one_class(scores), options, np.array([5])).sample_id.tolist()
    assert small == chosen(of_one_class(-scores), options, np.array([5])).sample_id.tolist()
    assert small == chosen(of_one_class(scores), options, np.array([9])).sample_id.tolist()[:5]
    assert small != chosen(of_one_class(scores), SelectConfig(selector="random", seed=4), np.array([5])).sample_id.tolist()


def test_random_keys_are_splitmix64() -> None:
    """The generator's published first outputs from state 1234567; every bit is set about half of the time."""
    from unittest.mock import patch

    with patch("d2c_ray.selection.draw.derive", lambda *_: 1234567):
        found = random_keys(0, np.arange(3))
    assert found.tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    keys = random_keys(1, np.arange(100_000))
    assert len(np.unique(keys)) == 100_000
    bits = np.unpackbits(keys.view(np.uint8)).reshape(-1, 64).mean(0)
    assert np.abs(bits - 0.5).max() < 0.01


def test_strata_get_even_shares_smallest_first() -> None:
    """Ten images in strata of 1, 2, 0 and 7, by hand: the smallest give all they have, the rest comes from the largest."""
    given_by = stratified.shares(np.zeros(3, int), np.array([1, 2, 7]), np.array([6]))
    assert given_by.tolist() == [1, 2, 3]
    part = of_one_class([0, 1, 1, 3, 3, 3, 3, 3, 3, 4])
    choice = chosen(part, SelectConfig(selector="stratified", strata=4), np.array([6]))
    assert choice.sample_id[:3].tolist() in ([0, 1, 2], [0, 2, 1])
    cut = chosen(part, SelectConfig(selector="stratified", strata=4, cutoff=0.7), np.array([2]))
    assert set(cut.sample_id.tolist()) <= {0, 1, 2}
    assert set(chosen(part, SelectConfig(selector="stratified", cutoff=0.9), np.array([5])).rank.tolist()) == set(range(5))


def write_scores(folder: Path, labels: np.ndarray, scores: np.ndarray, rows_per_part: int = 20) -> list[Path]:
    """Score parts as the score stage leaves them; sample_ids have gaps where rows were rejected."""
    fields = tables.arrow_schema(schema.SCORES, lists=2)
    for part, start in enumerate(range(0, len(labels), rows_per_part)):
        row = np.arange(start, min(start + rows_per_part, len(labels)))
        errors = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(2 * len(row), np.float32)), 2)
        columns = {
            "sample_id": 3 * row, "key": [f"image {index}" for index in row], "label": labels[row], "score": scores[row],
            "errors": errors, "shard": np.full(len(row), part),
        }  # fmt: skip
        tables.write(folder / f"part-{part:06d}.parquet", pa.table(columns).cast(fields), {}, 7)
    return sorted(folder.glob("part-*.parquet"))


def selected(out: Path) -> tuple[pa.Table, list[dict]]:
    return tables.read(sorted(out.glob("part-*.parquet"))), tables.read(out / score_parts.CLASSES).to_pylist()


def test_from_files_to_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_parts, "ROWS_PER_PART", 6)
    rng = np.random.default_rng(6)
    labels, scores = rng.integers(0, 3, 90).astype(np.int32), rng.integers(0, 20, 90).astype(np.float32)
    labels[labels == 1] = 0
    labels[:2] = 3
    parts = write_scores(tmp_path / "scores", labels, scores)
    tables.write(tmp_path / "scores" / "part-000009.parquet", tables.read(parts[:1]).slice(0, 0))  # all of a shard was rejected
    parts = sorted((tmp_path / "scores").glob("*.parquet"))
    options = SelectConfig(budget=15, f=0.5)
    total, facts = select(parts, ["a", "none", "c", "d"], options, tmp_path / "out", "scores-1")
    table, classes = selected(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("part-*.parquet"))) == 3
    assert (total, facts["images"], facts["shortfall"], facts["num_classes"]) == (90, 15, 3, 3)
    assert table.schema.equals(tables.arrow_schema(schema.SELECTION), check_metadata=False)
    assert tables.metadata(next((tmp_path / "out").glob("part-*")))["scores"] == "scores-1"
    ids = table.column("sample_id").to_numpy()
    assert (np.diff(ids) > 0).all()
    assert table.column("key").to_pylist() == [f"image {i // 3}" for i in ids]
    assert table.column("label").to_numpy().tolist() == labels[ids // 3].tolist()
    assert table.column("score").to_numpy().tolist() == scores[ids // 3].tolist()
    for row in table.to_pylist():
        same = [(scores[i], i) for i in range(90) if labels[i] == row["label"]]
        assert sorted(same)[row["rank"]][1] == row["sample_id"] // 3
        assert row["class_size"] == len(same)
    assert [(row["label"], row["name"], row["quota"], row["shortfall"]) for row in classes] == [
        (0, "a", 7, 0),
        (2, "c", 6, 0),
        (3, "d", 2, 3),
    ]
    for row in classes:
        mine = table.filter(pc.equal(table.column("label"), row["label"]))
        assert (row["score_min"], row["score_max"]) == (min(mine["score"].to_pylist()), max(mine["score"].to_pylist()))
        assert row["deepest_rank"] == max(mine["rank"].to_pylist()) / row["size"]
        assert row["nominal_f"] == (0.5 if row["label"] != 3 else 1.0)


def test_without_labels_there_is_one_class(tmp_path: Path) -> None:
    parts = write_scores(tmp_path / "scores", np.full(50, -1, np.int32), np.arange(50, dtype=np.float32))
    select(parts, [""], SelectConfig(selector="hardest", budget=4), tmp_path / "out")
    table, classes = selected(tmp_path / "out")
    assert table.column("label").to_pylist() == [-1] * 4 and table.column("rank").to_pylist() == [46, 47, 48, 49]
    assert [(row["label"], row["size"], row["nominal_f"]) for row in classes] == [(-1, 50, None)]


def broken_scores(folder: Path) -> list[Path]:
    scores = np.ones(50, np.float32)
    scores[[3, 31, 44]] = np.nan, np.inf, -np.inf
    return write_scores(folder, np.zeros(50, np.int32), scores)


def test_scores_that_are_no_numbers_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"3 of 50 scores are not finite, the first of image 3, image 31, image 44:"):
        select(broken_scores(tmp_path / "scores"), [""], SelectConfig(budget=4), tmp_path / "out")


@pytest.fixture(scope="module")
def on_ray():  # type: ignore[no-untyped-def]
    from d2c_ray.distributed import cluster

    cluster.connect(ResourcesConfig(num_cpus=4))
    yield
    cluster.disconnect()


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("labelled", [True, False])
def test_partitions_on_ray_change_nothing(selector: str, labelled: bool, on_ray, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A class of several partitions with ties across their borders, an empty one, and small ones that share a partition."""
    rng = np.random.default_rng(8)
    labels = (
        np.where(rng.random(400) < 0.6, 2, rng.choice([0, 3, 4, 5, 6], 400)).astype(np.int32) if labelled else np.full(400, -1, np.int32)
    )
    scores = rng.integers(0, 3, 400).astype(np.float32)
    names = list("abcdefg") if labelled else [""]
    parts = write_scores(tmp_path / "scores", labels, scores)
    options = SelectConfig(selector=selector, budget=90, strata=4, cutoff=0.2)
    one = select(parts, names, options, tmp_path / "one", "scores-1")
    many = select(parts, names, options, tmp_path / "many", "scores-1", rows_per_partition=60, rows_per_part=20)
    assert one == many
    for left, right in zip(selected(tmp_path / "one"), selected(tmp_path / "many"), strict=True):
        assert left == right


def test_scores_that_are_no_numbers_are_refused_by_name_on_ray(on_ray, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=r"3 of 50 scores are not finite, the first of image 3, image 31, image 44:"):
        select(
            broken_scores(tmp_path / "scores"), [""], SelectConfig(budget=4), tmp_path / "out", "", rows_per_partition=20, rows_per_part=20
        )
