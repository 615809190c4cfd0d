"""The stages reference and evaluate on real images: every number is that of a plain computation on the same images."""

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from test_pipeline import colour_folder as colours  # noqa: F401 - a fixture

from d2c_ray import plan as plans
from d2c_ray.config import Config
from d2c_ray.data import measured, reference_stats, tables, units
from d2c_ray.data.decode import decode, encode_png
from d2c_ray.distributed import embed
from d2c_ray.errors import UserError
from d2c_ray.evaluate import frechet
from d2c_ray.evaluate.copying import copying
from d2c_ray.evaluate.measures import measure
from d2c_ray.job import Job, Result
from d2c_ray.models import networks
from d2c_ray.rundir import StageDir, write_json
from d2c_ray.stages import evaluate, manifest, reference

pytestmark = pytest.mark.xdist_group("ray")  # one Ray at a time

NAMES = ("efficientnet-lite2", "efficientnet-lite0")
CHANGES = (
    "evaluate.more_networks=[efficientnet-lite0]", "evaluate.max_reference=60", "evaluate.image_size=32", "evaluate.bootstrap=4", "evaluate.kid_subsets=5",
    "evaluate.kid_subset_size=10", "evaluate.pairs=3",
)  # fmt: skip


def finish(stage: Callable[[Job], Result], config: Config, inputs: dict[str, StageDir], folder: Path) -> StageDir:
    folder.mkdir(exist_ok=True)
    found = stage(Job(config, inputs, folder, "", folder.name))
    write_json(folder / "_SUCCESS.json", {"facts": found.facts})
    return StageDir(folder)


def samples(folder: Path, guidance: float, columns: dict[str, list | np.ndarray], names: tuple[str, ...] = ()) -> StageDir:
    """Two parts as the sample stage leaves them."""
    for part in range(2):
        table = pa.table(
            {name: pa.array(list(values[10 * part : 10 * part + 10])) for name, values in columns.items() if name not in names}
        )
        for name in names:
            field = tables.arrow_schema({name: "tensor"}, {name: ("float32", columns[name].shape[1:])}).field(0)  # type: ignore[union-attr]
            table = table.append_column(field, tables.tensor_column(columns[name][10 * part : 10 * part + 10]))  # type: ignore[arg-type]
        tables.write(folder / f"part-{part:06d}.parquet", table, {})
    write_json(folder / "_SUCCESS.json", {"facts": {"record": {"guidance": guidance}}})
    return StageDir(folder)


@pytest.mark.usefixtures("local_ray")
def test_two_networks_measure_the_same_images(debug_config: Callable[..., Config], tmp_path: Path) -> None:
    config = debug_config(*CHANGES)
    inputs = {"manifest": finish(manifest.run, config, {}, tmp_path / "manifest")}
    inputs["reference"] = finish(reference.run, config, inputs, tmp_path / "reference")

    # A subset that is not all in the reference, and generated images: the digits with noise, 20 of them.
    listed = tables.read(inputs["manifest"].parts())
    subset = listed.take(pa.array(range(0, 120, 3)))
    tables.write(tmp_path / "attach" / "rows.parquet", subset, {}, 128)
    tables.write(tmp_path / "attach" / "selection.parquet", subset.select(["sample_id"]), {})
    inputs["attach"] = StageDir(tmp_path / "attach")

    def pixels(rows: pa.Table) -> np.ndarray:
        return units.pixels_of(units.decode_rows(rows, config.data, config.storage)[0])

    asked = np.arange(0, 120, 6)
    made = pixels(listed.take(pa.array(asked))).astype(int) + np.random.default_rng(0).integers(-40, 41, (20, 8, 8, 1))
    images = [encode_png(image) for image in made.clip(0, 255).astype(np.uint8)]
    made = np.stack([decode(image, 8, 1, config.data.max_pixels) for image in images])
    columns: dict[str, list | np.ndarray] = {"index": np.arange(20), "label": listed.column("label").to_numpy()[asked], "image": images}
    inputs["sample"] = samples(tmp_path / "samples", 1.5, columns)
    metrics = finish(evaluate.run, config, inputs, tmp_path / "eval").success()["facts"]
    assert metrics == json.loads((tmp_path / "eval" / "metrics.json").read_text())

    # The same by hand.
    rows, facts = tables.read(inputs["reference"].path / "rows.parquet"), inputs["reference"].success()["facts"]
    labels, held_out = rows.column("label").to_numpy(), np.isin(rows.column("sample_id").to_numpy(), facts["held_out_ids"])
    assert (held_out.sum(), len(rows)) == (20, 80)
    assert not np.isin(subset.column("sample_id").to_numpy(), rows.column("sample_id").to_numpy()).all()
    by_network = {}
    for name, found in zip(NAMES, (metrics, metrics["more"]["efficientnet-lite0"]), strict=True):
        network = networks.load(name, config.evaluate, torch.device("cpu"))
        real, by_network[name] = network.features(pixels(rows)), network.features(made)
        wanted = measure(
            reference=real[~held_out], reference_labels=labels[~held_out], held_out=real[held_out], held_out_labels=labels[held_out],
            generated=by_network[name], asked=np.asarray(columns["label"]), subset=network.features(pixels(subset)),
            subset_ids=subset.column("sample_id").to_numpy(), neighbours=3, bootstrap=4, kid_subsets=5, kid_subset_size=10, pairs=3,
            probe=name == "efficientnet-lite2",
        )  # fmt: skip
        assert {key: found[key] for key in wanted} == json.loads(json.dumps(wanted))
        assert found["counts"] == {"generated": 20, "sampled": 20, "real": 20, "subset": 40, "reference": 60, "width": 1280}
    record, more = metrics["record"], metrics["more"]["efficientnet-lite0"]
    lite2, lite0 = (networks.facts(name, config.evaluate) for name in NAMES)
    assert [record[key] for key in ("network", "network_weights", "network_image_size")] == ["efficientnet-lite2", lite2["weights"], 32]
    assert [record[key] for key in ("kid_subsets", "kid_subset_size", "bootstrap", "reference_statistics")] == [5, 10, 4, None]
    assert (record["guidance"], record["reference"], metrics["unguided"]) == (1.5, 60, None)
    assert more["network"] == lite0
    # Which images they are, not what a network made of them on some machine in some batches.
    against = rows.filter(pa.array(~held_out))
    for change, same in (("evaluate.device_batch=7", True), ("evaluate.image_size=64", True), ("data.image_size=12", False)):
        other_job = Job(debug_config(*CHANGES[1:], change), {}, tmp_path, "", "")
        assert (reference._which(other_job, against) == record["reference_images"]) == same, change
    assert reference._which(other_job, against) != reference._which(other_job, against.slice(1))
    assert metrics["notices"] == [more["notice"]]
    assert "efficientnet-lite0 is also a network that students are aligned with (attach.vision.encoder)" in more["notice"]

    # Where training flips, copies are sought among mirror images too; the rest stays as it is.
    (tmp_path / "flipped").mkdir()
    for folder in ("samples", "subset"):
        shutil.copytree(tmp_path / "eval" / folder, tmp_path / "flipped" / folder)  # as an interrupted attempt leaves them
    flipped = finish(evaluate.run, debug_config(*CHANGES, "data.flip=true"), inputs, tmp_path / "flipped").success()["facts"]
    assert flipped["record"] == record | {"copying_orientations": 2} and record["copying_orientations"] == 1
    for name, found, plain in (
        ("efficientnet-lite2", flipped, metrics),
        ("efficientnet-lite0", flipped["more"]["efficientnet-lite0"], more),
    ):
        network = networks.load(name, config.evaluate, torch.device("cpu"))
        seen = [network.features(images) for images in (pixels(subset), pixels(subset)[:, :, ::-1].copy(), pixels(rows)[held_out])]
        ids = subset.column("sample_id").to_numpy()
        assert found["copying"] == copying(by_network[name], seen[2], seen[0], 3, ids, seen[1])
        assert found["copying"] != plain["copying"] and all(found[key] == plain[key] for key in ("generated", "real", "subset", "counts"))

    # Features in place of images, as many without guidance beside them, and distances to the reference's own statistics as a file.
    given = inputs["reference"].path / "statistics.npz"
    kept = debug_config(*CHANGES, "sample.keep=none", f"evaluate.reference={given}")
    light = {name: columns[name] for name in ("index", "label")}
    inputs["sample"] = samples(tmp_path / "kept", 1.5, light | by_network, NAMES)
    inputs["unguided"] = samples(tmp_path / "unguided", 1.0, light | {name: by_network[name] + 1 for name in NAMES}, NAMES)
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "eval" / "subset", tmp_path / "again" / "subset")  # as an interrupted attempt leaves it
    other = finish(evaluate.run, kept, inputs, tmp_path / "again").success()["facts"]
    assert not (tmp_path / "again" / "samples").exists()
    for name in ("generated", "real", "subset"):
        assert other[name]["frechet"] == pytest.approx(metrics[name]["frechet"], rel=1e-6)
        assert other[name]["kid"] == metrics[name]["kid"] and other[name]["recall"] == metrics[name]["recall"]
    assert other["per_class"] is None and other["copying"] == metrics["copying"]
    statistics = reference_stats.read("", given, 1280, "")
    assert other["record"] == record | {"reference_statistics": reference_stats.content_hash(statistics)} and statistics.count == 60
    without, further = other["unguided"], other["more"]["efficientnet-lite0"].pop("unguided")
    assert other["more"] == metrics["more"]
    assert without["record"] == other["record"] | {"guidance": 1.0} and without["real"] == other["real"]
    for name, shifted, plain in (("efficientnet-lite2", without, other), ("efficientnet-lite0", further, more)):
        # The mean moves by 1 in each feature and the covariance stays.
        assert shifted["generated"]["frechet"] != plain["generated"]["frechet"]
        against = statistics if name == "efficientnet-lite2" else reference_stats.read("", given.with_name("statistics-1.npz"), 1280, "")
        moved = 2 * (by_network[name].astype(float).mean(0) - against.mean).sum() + 1280
        assert shifted["generated"]["frechet"] == pytest.approx(plain["generated"]["frechet"] + moved, rel=1e-5)

    given.write_bytes(given.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"evaluate\.reference: .*cannot be used as reference statistics"):
        plans.make(kept, "evaluate")


def test_what_changes_a_number_changes_the_plan(debug_config: Callable[..., Config], tmp_path: Path) -> None:
    def hashes(*changes: str) -> tuple[str, str]:
        plan = plans.make(debug_config(*changes), "evaluate")
        return plan.of("reference")[0].hash, plan.of("evaluate")[0].hash

    plain = hashes()
    for change in ("more_networks=[efficientnet-lite0]", "max_reference=30", "seed=1", "image_size=96", "device_batch=7"):
        assert hashes(f"evaluate.{change}")[0] != plain[0], change
    for change in ("neighbours=4", "kid_subsets=7", "kid_subset_size=9", "bootstrap=3", "pairs=2"):
        found = hashes(f"evaluate.{change}")
        assert found[0] == plain[0] and found[1] != plain[1], change
    for name, scale in (("a", 1.0), ("moved", 1.0), ("other", 2.0)):
        np.savez(tmp_path / f"{name}.npz", mu=np.zeros(1280), sigma=np.eye(1280) * scale)
    by_file = {name: hashes(f"evaluate.reference={tmp_path / name}.npz") for name in ("a", "moved", "other")}
    assert by_file["a"] == by_file["moved"] and by_file["a"][0] == plain[0]
    assert len({plain[1], by_file["a"][1], by_file["other"][1]}) == 3
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(8), sigma=np.eye(8))
    with pytest.raises(UserError, match="holds statistics of 8 features, and efficientnet-lite2 has 1280"):
        hashes(f"evaluate.reference={tmp_path / 'narrow.npz'}")


@pytest.mark.usefixtures("local_ray")
def test_features_are_kept_as_they_come(
    debug_config: Callable[..., Config], request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many broken images end the stage, and what it had finished is not made again; the parts' size changes no bit."""
    changes = (
        "data.source=folder", f"data.path={request.getfixturevalue('colours')}", "data.image_size=16", "data.channels=3", "data.limit_per_class=0", "evaluate.image_size=32",
        "sample.num_images=20", "resources.actors=1",
    )  # fmt: skip
    strict, lenient = debug_config(*changes, "data.max_rejected=0"), debug_config(*changes, "data.max_rejected=0.05")
    inputs = {"manifest": finish(manifest.run, lenient, {}, tmp_path / "manifest")}
    whole = finish(reference.run, lenient, inputs, tmp_path / "whole")
    (part,) = StageDir(whole.path / measured.FEATURES).parts()
    assert tables.metadata(part)["device"] and len(tables.metadata(part)["rejected"]) == 1
    broken = tables.read(whole.path / "rejected.parquet").to_pylist()
    assert [row["key"].rsplit("/", 1)[1] for row in broken] == ["03.jpg"]

    monkeypatch.setattr(embed, "ROWS_PER_UNIT", 3)
    with pytest.raises(UserError, match=r"(?s)1 of 48 images cannot be used.*Finished shards are kept") as refusal:
        finish(reference.run, strict, inputs, tmp_path / "parts")
    assert "03.jpg" in str(refusal.value)
    folder = StageDir(tmp_path / "parts" / measured.FEATURES)
    before = {path: path.stat().st_mtime_ns for path in folder.parts()}
    assert 2 <= len(before) < 16, "the broken one is the fourth"
    parts = finish(reference.run, lenient, inputs, tmp_path / "parts")
    assert len(folder.parts()) == 16 and {path: path.stat().st_mtime_ns for path in before} == before
    assert tables.read(tmp_path / "parts" / "rejected.parquet").to_pylist() == broken
    one, other = tables.read(part), tables.read(folder.parts())
    assert one.column("id").to_pylist() == other.column("id").to_pylist() and len(other) == 47
    network = "efficientnet-lite2"
    assert np.array_equal(tables.tensor_values(one, network), tables.tensor_values(other, network))
    assert whole.success()["facts"] == parts.success()["facts"]
    mine, theirs = (reference_stats.read("", found.path / "statistics.npz", 1280, "") for found in (whole, parts))
    np.testing.assert_allclose(mine.sigma, theirs.sigma, rtol=0, atol=1e-12)

    lost = folder.parts()[3]
    facts = tables.metadata(lost)
    tables.write(lost, tables.read(lost).replace_schema_metadata(None), facts | {"device": "another kind"})
    with pytest.raises(UserError, match="made on one kind of hardware"):
        finish(reference.run, lenient, inputs, tmp_path / "parts")


def made_up(folder: Path, ids: np.ndarray, rng: np.random.Generator, rows: int = 1000) -> StageDir:
    """Parts of features that are cheap to store: few different values."""
    for number, start in enumerate(range(0, len(ids), rows)):
        some = ids[start : start + rows]
        features = rng.integers(0, 8, (len(some), 1280)).astype(np.float32) + (some % 10)[:, None] / 4
        tables.write(folder / f"part-{number:06d}.parquet", measured.table(some, some % 10, {"efficientnet-lite2": features}), {})
    return StageDir(folder)


def test_blocks_do_not_depend_on_how_rows_are_cut_into_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "BLOCK", 50)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(173, 6)).astype(np.float32)
    found = {}
    for size in (3, 50, 64, 200):
        parts = []
        for start in range(0, 173, size):
            rows = np.arange(start, min(173, start + size))
            parts.append(tmp_path / f"{size}-{start:03d}.parquet")
            tables.write(parts[-1], measured.table(rows, rows % 4, {"net": features[rows]}), {})
        every = list(measured.blocks(parts, "net"))
        assert [len(block.ids) for block in every] == [50, 50, 50, 23]
        assert np.array_equal(np.concatenate([block.features for block in every]), features)
        assert np.array_equal(np.concatenate([block.ids for block in every]), np.arange(173))
        moments = frechet.Moments(6)
        for block in every:
            moments.update(block.features)
        found[size] = moments.statistics().sigma
    assert all(np.array_equal(sigma, found[3]) for sigma in found.values())


def test_measuring_takes_no_memory_for_the_reference(
    debug_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten times as many real images, trained on in part: the same memory to a few blocks, and the distance is to all of them."""
    monkeypatch.setattr(evaluate, "MOST_REFERENCE", 300)
    monkeypatch.setattr(evaluate, "MOST_TRAINING", 100)
    monkeypatch.setattr(measured, "BLOCK", 500)
    config = debug_config(
        "sample.keep=none", "sample.num_images=60", "evaluate.kid_subsets=2", "evaluate.pairs=2", "resources.gpus_per_actor=0"
    )
    facts = networks.facts("efficientnet-lite2", config.evaluate)
    peaks, metrics = [], {}
    for count in (1500, 15_000):
        root, rng = tmp_path / str(count), np.random.default_rng(0)
        parts = made_up(root / "reference" / measured.FEATURES, np.arange(count), rng).parts()
        held_out = np.arange(0, count, count // 60)[:60]
        moments = frechet.Moments(1280)
        for block in measured.blocks(parts, "efficientnet-lite2"):
            moments.update(block.features[~np.isin(block.ids, held_out)])
        reference_stats.write(root / "reference" / "statistics.npz", moments.statistics())
        told = {**facts, "images": moments.count, "statistics": "statistics.npz"}
        write_json(
            root / "reference" / "_SUCCESS.json",
            {"facts": {"held_out_ids": held_out.tolist(), "networks": {"efficientnet-lite2": told}, "reference_images": ""}},
        )
        trained = np.setdiff1d(np.arange(count), held_out)[: count // 2]
        tables.write(root / "attach" / "selection.parquet", pa.table({"sample_id": trained}), {})
        made = made_up(root / "made", np.arange(60), rng)
        for part in made.parts():
            tables.write(part, tables.read(part).rename_columns(["index", "label", "efficientnet-lite2"]), {})
        write_json(root / "made" / "_SUCCESS.json", {"facts": {"record": {"guidance": 1.5}}})
        inputs = {"reference": StageDir(root / "reference"), "attach": StageDir(root / "attach"), "sample": made}
        usual = pa.default_memory_pool()
        arrow = pa.proxy_memory_pool(usual)
        pa.set_memory_pool(arrow)
        tracemalloc.start()
        metrics[count] = finish(evaluate.run, config, inputs, root / "eval").success()["facts"]
        peaks.append((tracemalloc.get_traced_memory()[1], arrow.max_memory()))
        tracemalloc.stop()
        pa.set_memory_pool(usual)
        whole = measured.read(parts, "efficientnet-lite2").features
        outside = np.ones(count, bool)
        outside[held_out] = False
        against, generated = frechet.statistics(whole[outside]), measured.read(made.parts(), "efficientnet-lite2").features
        assert metrics[count]["generated"]["frechet"] == pytest.approx(
            frechet.frechet_distance(frechet.statistics(generated), against), rel=1e-7
        )
        floor = frechet.frechet_distance(frechet.statistics(whole[trained]), against)
        assert metrics[count]["subset"]["frechet"] == pytest.approx(floor, rel=1e-5, abs=1e-6 * against.trace)
        assert metrics[count]["counts"] == {
            "generated": 60,
            "sampled": 60,
            "real": 60,
            "subset": count // 2,
            "reference": count - 60,
            "width": 1280,
        }
        assert metrics[count]["copying"]["training"] == 100 and metrics[count]["generated"]["kid_count"] == 300
        assert metrics[count]["record"]["probe_rows"] == 300 and metrics[count]["record"]["reference_rows"] == 300
        assert f"copies are sought among 100 of the {count // 2:,} training images, drawn once" in metrics[count]["notices"]
    more, blocks = 13_500 * 1280 * 4, 8 * 500 * 1280 * 4  # Arrow's threads may hold some blocks more at a time, and may not
    assert blocks < more / 3
    for few, many in zip(*peaks, strict=True):
        assert few > 1e6 and many - few < blocks, f"{many / 2**20:.0f} MiB for ten times the images of {few / 2**20:.0f} MiB"
