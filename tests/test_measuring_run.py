"""The stages reference and evaluate on real images: every number is that of a plain computation on the same images."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from d2c_ray import plan as plans
from d2c_ray.config import Config
from d2c_ray.data import reference_stats, tables, units
from d2c_ray.data.decode import decode, encode_png
from d2c_ray.errors import UserError
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

    # Features in place of images, as many without guidance beside them, and distances to the reference's own statistics as a file.
    given = inputs["reference"].path / "statistics.npz"
    kept = debug_config(*CHANGES, "sample.keep=none", f"evaluate.reference={given}")
    light = {name: columns[name] for name in ("index", "label")}
    inputs["sample"] = samples(tmp_path / "kept", 1.5, light | by_network, NAMES)
    inputs["unguided"] = samples(tmp_path / "unguided", 1.0, light | {name: by_network[name] + 1 for name in NAMES}, NAMES)
    (tmp_path / "again").mkdir()
    shutil.copy(tmp_path / "eval" / "subset.parquet", tmp_path / "again")  # as an interrupted attempt leaves it
    other = finish(evaluate.run, kept, inputs, tmp_path / "again").success()["facts"]
    assert not (tmp_path / "again" / "samples.parquet").exists()
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
