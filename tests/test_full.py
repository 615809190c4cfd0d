"""Training on all images, and encoding while training: what is shown is what would have been stored."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import DEBUG
from test_condensed import real_rows, tiny_vae  # noqa: F401 - a fixture

from d2c_ray import pipeline
from d2c_ray import plan as plans
from d2c_ray.config import Config, TrainConfig, VaeConfig, VisionConfig, load
from d2c_ray.data import attached, condensed, tables, units
from d2c_ray.data.export import export
from d2c_ray.data.verify import check
from d2c_ray.errors import UserError
from d2c_ray.models import frozen
from d2c_ray.models.transformer import TransformerSpec
from d2c_ray.training import batches, loop, online
from d2c_ray.training.online import Online

pytestmark = pytest.mark.xdist_group("ray")  # one Ray at a time

CPU = torch.device("cpu")
VISION = VisionConfig(encoder="efficientnet-lite0", image_size=64, device_batch=12)
GRID = 4


@pytest.fixture(scope="module")
def vae(tiny_vae: Path) -> VaeConfig:  # noqa: F811
    return VaeConfig(path=str(tiny_vae), device_batch=5, encode="training")


@pytest.fixture(scope="module")
def images(cifar10: Path) -> tuple[pa.Table, np.ndarray]:
    rows, _ = real_rows(cifar10, 40)
    return rows, units.pixels_of(rows)


def as_stored(images: tuple[pa.Table, np.ndarray], folder: Path, vae: VaeConfig, int8: bool, store: bool) -> condensed.Condensed:
    """A condensed dataset of one part, with everything stored or the pixels alone."""
    rows, pixels = images
    loaded = frozen.Vae(vae, CPU)
    latent = {"kind": "vae", "channels": 2, "side": 16, "scale": loaded.scale, "shift": loaded.shift}
    facts = {"class_names": [str(i) for i in range(10)], "flip": True, "latent": latent, "fingerprint": f"{int8}{store}", "grid": GRID}
    folder.mkdir()
    if store:
        rows = attached.add(rows.drop_columns("pixels"), attached.latents(torch.from_numpy(pixels), loaded, True))
        encoder = frozen.VisionEncoder("efficientnet-lite0", 64, CPU, VISION.device_batch)
        found, cosine = attached.tokens(torch.from_numpy(pixels), encoder, GRID, True, int8, "vision", VISION.device_batch)
        rows = attached.add(rows, found, {"vision": cosine})
    else:
        facts["in_training"] = ["latent", "vision"]
    attached.write(folder / "part-000000.parquet", rows, {"rejected": []}, facts["class_names"])
    (folder / "_SUCCESS.json").write_text(json.dumps({"facts": facts}))
    return condensed.open(folder, folder / "cache", condensed.training_columns(facts, ""))


def of_training(vae: VaeConfig) -> Online:
    config = load(None, ["attach.text.encoder=none", f"vae.path={vae.path}", f"vae.device_batch={vae.device_batch}", "vae.encode=training",
                         "attach.vision.encoder=efficientnet-lite0", "attach.vision.image_size=64", "attach.vision.device_batch=12", "attach.vision.encode=training",
                         "evaluate.network=efficientnet-lite2", "model.patch=4"])  # fmt: skip
    facts = {"latent": {"side": 16}, "in_training": ["latent", "vision"]}
    return online.of(config, facts, config.model, config.train)


@pytest.mark.parametrize("int8", [True, False])
def test_what_is_encoded_while_training_is_what_is_stored(images, vae: VaeConfig, tmp_path: Path, int8: bool) -> None:
    """To the rounding of the storage: half for latents, bf16 or an int8 step for tokens, of the images as they are shown."""
    stored = as_stored(images, tmp_path / "stored", vae, int8, True).training_set()
    encoders = of_training(vae)
    assert (encoders.width, encoders.grid) == (1280, GRID)
    shown = as_stored(images, tmp_path / "pixels", vae, int8, False).training_set("", encoders)
    assert stored.latent_shape == shown.latent_shape == (2, 16, 16) and stored.posterior and shown.posterior
    assert stored.aligned and shown.aligned and shown.pixels is not None and shown.latent_mean is None and shown.vision is None
    rows = np.random.default_rng(0).permutation(40)[:32]
    draws = batches.draw(0, 3, 0, 32, stored.latent_shape, 0.1, True, True, CPU)
    assert 5 < int(draws.flip.sum()) < 27
    one, other = (batches.gather(data, rows, draws, True) for data in (stored, shown))
    assert torch.equal(one["label"], other["label"])
    mean = torch.from_numpy(stored.latent_mean[rows, draws.flip.long().numpy()].astype(np.float32))
    std = torch.from_numpy(stored.latent_std[rows, draws.flip.long().numpy()].astype(np.float32))
    half = (mean.abs() + std * draws.posterior.abs()) * 2.0**-11 * stored.latent_scale  # half a step of ten bits
    assert ((one["z"] - other["z"]).abs() <= half + 1e-6).all()
    tokens = one["vision"]
    if int8:
        scale = torch.from_numpy(stored.vision_scale[rows, draws.flip.long().numpy()])[..., None]
        assert ((tokens * scale - other["vision"]).abs() <= scale * 0.501 + 1e-6).all()
    else:
        assert torch.equal(tokens, other["vision"].bfloat16().float())
    plain = batches.gather(shown, rows, batches.Draws(draws.uniform_t, ~draws.flip, draws.dropped, draws.noise, draws.posterior), True)
    assert not torch.allclose(plain["vision"], other["vision"], atol=0.1), "an image and its mirror image give other tokens"


def test_no_bit_depends_on_how_a_batch_is_spread_over_workers(images, vae: VaeConfig, tmp_path: Path) -> None:
    data = as_stored(images, tmp_path / "pixels", vae, True, False).training_set("", of_training(vae))
    rows, args = np.arange(32), {"shape": data.latent_shape, "dropout": 0.1, "flip": True, "posterior": True, "device": CPU}
    whole = batches.gather(data, rows, batches.draw(0, 0, 0, 32, **args), True)
    halves = [batches.gather(data, rows[at : at + 16], batches.draw(0, 0, at, 16, **args), True) for at in (0, 16)]
    for name in ("z", "vision", "label"):
        assert torch.equal(torch.cat([half[name] for half in halves]), whole[name]), name


def test_a_model_of_pixels_sees_the_pixels_that_are_encoded(images) -> None:
    """The same z to the bit, with and without an encoder beside it; and none is asked where nothing is aligned."""
    _, pixels = images
    plain = batches.TrainingSet(np.zeros(40, np.int64), 1, True, pixels=pixels)
    encoder = frozen.VisionEncoder("efficientnet-lite0", 64, CPU, 4)
    data = batches.TrainingSet(np.zeros(40, np.int64), 1, True, pixels=pixels, vision_encoder=encoder, grid=GRID)
    assert data.aligned and not data.posterior and not plain.aligned and data.latent_shape == (3, 32, 32)
    draws = batches.draw(0, 0, 0, 16, data.latent_shape, 0.0, True, False, CPU)
    rows = np.arange(16)
    found = batches.gather(data, rows, draws, True)
    assert torch.equal(found["z"], batches.gather(plain, rows, draws, False)["z"])
    assert "vision" not in batches.gather(data, rows, draws, False)
    sides = np.where(draws.flip.numpy()[:, None, None, None], pixels[:16, :, ::-1], pixels[:16])
    assert torch.equal(found["vision"], encoder.tokens(torch.from_numpy(sides), GRID))


def test_a_training_learns_from_what_it_encodes(images, vae: VaeConfig, tmp_path: Path) -> None:
    """The losses are those on the stored dataset, to its rounding."""
    spec = TransformerSpec("sit", 16, 2, 4, 1, 32, 2, 10, vision_width=1280, align_depth=1, align_hidden=16)
    options = TrainConfig(num_images=48, batch_size=16, precision="fp32", log_every=16, checkpoint_every=480)
    curves = []
    for store in (True, False):
        opened = as_stored(images, tmp_path / f"{store}", vae, False, store)
        data = opened.training_set() if store else opened.training_set("", of_training(vae))
        logs: list[dict] = []
        loop.train(spec, options, data, device=CPU, log=logs.append, checkpoint=lambda step, save: None)
        curves.append([(log["loss"], log["loss_align"]) for log in logs])
    assert np.allclose(curves[0], curves[1], atol=2e-3) and curves[0] != curves[1]


def test_a_dataset_of_pixels_says_which_encoder_it_takes(images, vae: VaeConfig, tmp_path: Path) -> None:
    opened = as_stored(images, tmp_path / "pixels", vae, True, False)
    with pytest.raises(UserError, match=r"holds no latents: .* takes the VAE \(vae\.path\)"):
        opened.training_set(None)
    with pytest.raises(UserError, match="holds no tokens 'vision'"):
        opened.training_set("", Online(vae, weights=(("latent", frozen.encoder_hash(vae.path, "")),)))
    with pytest.raises(UserError, match=r"vae\.path: the weights on this node .* planned with \(0123\)"):
        opened.training_set(None, Online(vae, weights=(("latent", "0123"),)))
    assert condensed.training_columns(opened.facts, "") == condensed.training_columns(opened.facts, None) == ["pixels"]
    both = {"latent": {"kind": "vae"}, "in_training": ["vision"]}
    assert condensed.training_columns(both, "") == ["latent_mean", "latent_std", "pixels"]
    assert condensed.training_columns(both, "large") == ["latent_mean", "latent_std", "vision_large"]


# The plan


def names(config: Config) -> dict[str, str]:
    return {stage: node.hash for stage, node in plans.make(config, "train").arms["student"].items()}


def test_all_images_need_no_teacher_and_no_scores(debug_config) -> None:
    config = debug_config("select.selector=all")
    plan = plans.make(config)
    assert [node.stage for node in plan.nodes] == ["manifest", "select", "attach", "train", "sample", "reference", "evaluate"]
    for ignored in ("select.budget=7", "select.k=3", "select.f=0.2", "select.balance=proportional", "select.seed=5"):
        assert names(debug_config("select.selector=all", ignored)) == names(config), ignored
    assert names(debug_config("select.selector=random"))["select"] != names(config)["select"]


def test_encoders_of_a_training_name_the_training_and_not_the_dataset(debug_config) -> None:
    ahead = names(debug_config())
    base = names(debug_config("attach.vision.encode=training"))
    assert base["attach"] != ahead["attach"] and base["train"] != ahead["train"]
    for change in ("attach.vision.image_size=96", "attach.vision.device_batch=5"):
        changed = names(debug_config("attach.vision.encode=training", change))
        assert changed["attach"] == base["attach"] and changed["train"] != base["train"], change
    off = names(debug_config("attach.vision.encoder=none"))
    assert names(debug_config("attach.vision.encoder=none", "attach.vision.encode=training")) == off
    unaligned = names(debug_config("attach.vision.encode=training", "train.align_weight=0"))
    assert unaligned == names(debug_config("attach.vision.encode=training", "train.align_weight=0", "attach.vision.image_size=96"))


def test_where_a_training_starts_is_known_by_its_weights(debug_config, tmp_path: Path) -> None:
    from test_refusals import model_folder

    for name in ("one", "two"):
        torch.manual_seed(len(name) + (name == "two"))
        model_folder(tmp_path / name)
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    base = names(debug_config())
    one, copy, two = (names(debug_config(f"train.start={tmp_path / name}")) for name in ("one", "copy", "two"))
    assert one == copy and one["train"] not in (base["train"], two["train"]) and one["attach"] == base["attach"]
    teacher = names(debug_config(f"teacher.train.start={tmp_path / 'one'}"))
    assert (
        teacher["teacher"] != base["teacher"]
        and teacher["teacher"] == names(debug_config(f"teacher.train.start={tmp_path / 'copy'}"))["teacher"]
    )


def test_a_start_that_does_not_fit_is_refused_before_anything_is_spent(debug_config, tmp_path: Path) -> None:
    from test_refusals import model_folder

    model_folder(tmp_path / "one")
    for key, own in (("train.start", "model"), ("teacher.train.start", "teacher.model")):
        config = debug_config(f"{key}={tmp_path / 'one'}", f"{own}.depth=2")
        data = {"rows": 120, "class_names": [f"digit {i}" for i in range(10)], "class_counts": [12] * 10}
        with pytest.raises(UserError, match=rf"{key}=.* is another model: depth=1"):
            plans.check_against_data(plans.make(config), data)


def test_all_images_with_attach_and_without_are_one_arm_away(debug_config) -> None:
    config = debug_config(
        "arms.Full={select: {selector: all}, attach: {text: {encoder: none}, vision: {encoder: none}}}",
        "arms.REPA={select: {selector: all}, attach: {vision: {encode: training}}}",
        "arms.D2C={}",
    )
    arms = plans.make(config).arms
    assert arms["Full"]["select"] is arms["REPA"]["select"] is not arms["D2C"]["select"]
    assert arms["Full"]["attach"] is not arms["REPA"]["attach"]
    assert "score" in arms["D2C"] and "score" not in arms["Full"]


# A run


def test_a_run_on_all_images_encodes_while_it_trains(local_ray, cifar10: Path, tmp_path: Path) -> None:
    """Latents and the tokens to align with from encoders that run while training; one image is broken."""
    from test_pipeline import vae_folder

    folder = tmp_path / "images"
    labels = (cifar10 / "classes.txt").read_text().split()
    for index, row in enumerate(pq.read_table(cifar10 / "train-000.parquet").slice(0, 60).to_pylist()):
        place = folder / labels[row["label"]]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index:03d}.jpg").write_bytes(row["image"]["bytes"] if index != 7 else row["image"]["bytes"][:200])
    config = load(DEBUG, [
        f"run.dir={tmp_path}", "data.source=folder", f"data.path={folder}", "data.image_size=32", "data.channels=3", "data.flip=true", "data.limit_per_class=0",
        "data.max_rejected=0.05", f"vae.path={vae_folder(tmp_path / 'vae')}", "vae.encode=training", "attach.vision.device_batch=4", "train.num_images=64",
        "evaluate.neighbours=2", "evaluate.max_reference=30", "sample.num_images=12", "sample.keep=none", "resources.actors=1", "attach.rows_per_part=16",
        "arms.REPA={select: {selector: all}, attach: {vision: {encode: training}}}",
    ])  # fmt: skip
    plan = pipeline.run(config, say=lambda text: None)
    assert not plan.of("score") and not plan.of("teacher") and not plan.of("embed")
    (node,) = plan.of("attach")
    success = node.dir.success()
    assert (success["rows_in"], success["rows_done"], success["rows_rejected"]) == (60, 59, 1)
    assert success["facts"]["in_training"] == ["latent", "vision"]
    (rejected,) = tables.read(node.folder / "rejected.parquet").to_pylist()
    assert rejected["key"].endswith("/007.jpg") and rejected["stage"] == "attach"
    assert pq.read_schema(node.dir.parts()[0]).names == ["sample_id", "key", "label", "image", "pixels"]
    chosen = tables.read(node.folder / "selection.parquet")
    assert len(chosen) == 59 and rejected["key"] not in chosen.column("key").to_pylist()
    found = check(node.folder, 0)
    assert found.faults == [] and found.rows == 59 and found.decoded == 59
    assert sum("are not stored: they are encoded while training" in note for note in found.notes) == 2
    assert export(node.folder, "ids", tmp_path / "ids.txt") == 59
    card = (node.folder / "README.md").read_text()
    assert "encoded from the pixels while training" in card and "all 59 images" in card and "small part of its source" not in card
    spec = json.loads((plan.of("train")[0].folder / "model" / "model.json").read_text())["spec"]
    assert (spec["vision_width"], spec["input_size"], spec["text_tokens"]) == (1280, 16, 16)
    measured = json.loads((plan.of("evaluate")[0].folder / "metrics.json").read_text())
    assert measured["counts"]["subset"] + 1 in (42, 43), "all images that are measured anyway"
    page = (plan.folder / "report.html").read_text()
    floor = measured["counts"]["subset"]
    said = (
        f"select.selector=all: the floor is of {floor} of its 59 training images, the reference among them, and near 0 by that alone",
        f"select.selector=all: copies are sought among {floor} training images that are measured, and not among all 59",
        "every held-out real image is a training image as well: how near new ones come to those is not known",
    )
    assert all(note in measured["notices"] and note in page for note in said), measured["notices"]
    assert (
        measured["copying"]["orientations"] == 2
        and measured["copying"]["share_closer"] is None
        and "the mirror image counts as well" in page
    )
    assert page.count("The generated images were not kept (sample.keep=none).") == 1 and "Their images were not kept" in page
    assert pq.read_schema(plan.of("sample")[0].dir.parts()[0]).names == ["index", "label", "efficientnet-lite2"]
    assert "while training: latents by" in page and "vision by efficientnet-lite0" in page and "1 images could not be decoded" in page

    # Cut off after its first parts, it goes on: a part with a broken image is as finished as any.
    before = {path: path.stat().st_mtime_ns for path in node.dir.parts()}
    (node.folder / "_SUCCESS.json").unlink()
    lost = node.dir.parts()[-1]
    content = lost.read_bytes()
    lost.unlink()
    pipeline.run(config, "attach", say=lambda text: None)
    assert lost.read_bytes() == content
    assert {path: path.stat().st_mtime_ns for path in before if path != lost} == {path: at for path, at in before.items() if path != lost}
    assert tables.read(node.folder / "selection.parquet").equals(chosen)
