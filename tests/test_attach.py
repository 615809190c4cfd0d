"""Attaching on a real Ray: what is stored is what the encoders say of the stored image, whatever happens on the way."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
import torch.nn.functional as F
from conftest import DEBUG, ROOT
from drilling import Drill
from test_pipeline import kill, start, vae_folder, wait_for
from test_score import Chaos, no_ray_is_left, redone, teacher_folder  # noqa: F401 - a fixture for the whole module

from d2c_ray import pipeline
from d2c_ray import plan as plans
from d2c_ray.config import Config, ResourcesConfig, load, pools, to_yaml
from d2c_ray.data import tables
from d2c_ray.data.decode import decode
from d2c_ray.data.verify import check
from d2c_ray.distributed import attach, cluster
from d2c_ray.distributed.actors import Attacher
from d2c_ray.errors import UserError
from d2c_ray.models import frozen, latents, vision
from d2c_ray.rundir import StageDir
from d2c_ray.training.batches import dequantise

pytestmark = pytest.mark.xdist_group("ray")  # one Ray at a time

CPU = torch.device("cpu")
GRID = 8  # 32 px, latents of 16, patch 2


def given(cifar10: Path, models: Path, run_dir: Path, *overrides: str) -> Config:
    """24 of 60 real images with both flips, through a VAE and two vision encoders."""
    options = [
        f"run.dir={run_dir}", "data.source=parquet", f"data.path={cifar10}", "data.pattern=train-000.parquet", "data.limit_per_class=6",
        "data.image_size=32", "data.channels=3", "data.flip=true", f"vae.path={models / 'vae'}", "select.selector=random", "select.budget=24",
        "attach.rows_per_part=3", "attach.vision.image_size=64", "attach.vision.device_batch=4", "attach.also.large.encoder=efficientnet-lite0",
        "attach.also.large.image_size=96", "attach.also.large.storage=bf16", "attach.also.large.device_batch=4", "resources.actors=1", *overrides,
    ]  # fmt: skip
    if not (models / "teacher").is_dir():
        teacher_folder(models / "teacher", latents.latent_facts(load(DEBUG, options)))
    return load(DEBUG, [*options, f"teacher.checkpoint={models / 'teacher'}"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE, and a teacher in its latents."""
    folder = tmp_path_factory.mktemp("models")
    vae_folder(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def whole(cifar10: Path, models: Path, server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, StageDir]:
    """An undisturbed run, and its condensed dataset."""
    if not ray.is_initialized():
        cluster.connect(ResourcesConfig(num_cpus=6))
    config = given(cifar10, models, tmp_path_factory.mktemp("runs"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "disconnect", lambda: None)
        return config, attached(config)


@pytest.fixture
def again(whole: tuple[Config, StageDir], cifar10: Path, models: Path, tmp_path: Path) -> Callable[..., tuple[Config, StageDir]]:
    """A copy of the run with these changes, and where its condensed dataset lies: gone, or there but not finished."""

    def make(*overrides: str, keep: bool = False) -> tuple[Config, StageDir]:
        config = given(cifar10, models, tmp_path, *overrides)
        shutil.copytree(whole[1].path.parent, tmp_path / config.run.name)
        folder = plans.make(config, "attach").of("attach")[0].dir
        assert folder.path.name == whole[1].path.name
        (folder.path / "_SUCCESS.json").unlink()
        if not keep:
            shutil.rmtree(folder.path)
        return config, folder

    return make


def attached(config: Config) -> StageDir:
    (node,) = pipeline.run(config, "attach", say=lambda text: None).of("attach")
    return node.dir


def content(folder: StageDir) -> dict[str, bytes]:
    """The bytes of every table."""
    return {path.name: path.read_bytes() for path in sorted(folder.path.glob("*.parquet"))}


def test_stored_is_what_the_encoders_say_of_the_stored_image(whole: tuple[Config, StageDir]) -> None:
    config, folder = whole
    table = tables.read(folder.parts())
    assert table.column_names == [
        "sample_id", "key", "label", "image", "latent_mean", "latent_std", "vision", "vision_scale", "vision_large",
    ]  # fmt: skip
    assert len(table) == 24
    pixels = torch.from_numpy(np.stack([decode(image["bytes"], 32, 3, 10**6) for image in table.column("image").to_pylist()]))
    assert not torch.equal(pixels, pixels.flip(2))
    vae = frozen.Vae(config.vae, CPU)
    for side, image in enumerate((pixels, pixels.flip(2))):
        for name, fresh in zip(("latent_mean", "latent_std"), vae.encode(image), strict=True):
            assert np.array_equal(tables.tensor_values(table, name)[:, side], fresh.half().numpy()), name
        for column, options in config.attach.encoders().items():
            fresh = vision.load(options, GRID, CPU).tokens(image, GRID)
            assert fresh.shape == (24, GRID * GRID, 1280)
            scale = tables.tensor_values(table, "vision_scale")[:, side] if column == "vision" else None
            stored = dequantise(tables.tensor_values(table, column)[:, side], scale)
            # Half a step of int8, or half a unit in the last place of bf16.
            error = torch.from_numpy(scale)[..., None] * 0.5001 if scale is not None else fresh.abs() * 2**-8
            assert ((stored - fresh).abs() <= error).all(), column
            other = vision.load(options, GRID, CPU).tokens(image.flip(2), GRID)
            assert F.cosine_similarity(stored, fresh, dim=-1).mean() > F.cosine_similarity(stored, other, dim=-1).mean() + 0.01
    shown = folder.success()["facts"]["vision"]
    assert (shown["vision"]["storage"], shown["vision_large"]["storage"]) == ("int8", "bf16")
    assert attach.FAITHFUL < shown["vision"]["cosine_min"] < 1
    assert shown["vision_large"]["cosine_min"] > 0.99999
    told = json.loads((folder.path / "provenance.json").read_text())
    assert told["vision"] == shown
    assert told["latent"]["vae"] == frozen.vae_facts(config.vae.path, "")["hash"]
    assert list(told["cost_seconds"]) == ["manifest", "select", "attach"], "a random choice needs no teacher"
    selected = tables.read(folder.path / "selection.parquet")
    assert selected.column("key").to_pylist() == table.column("key").to_pylist()


def test_encoders_apart_and_more_actors_give_the_same_bytes(whole, again, local_ray: None) -> None:
    config, folder = again("resources.encoders_apart=true", "resources.actors=2")
    assert pools(config) == 3
    attached(config)
    assert content(folder) == content(whole[1])
    assert len(content(folder)) == 8 + 4, "parts; classes, selection, rows, rejected"


def test_a_cluster_at_hand_is_described_as_a_run_would_use_it(local_ray: None) -> None:
    """Six logical CPUs, two of them for light work."""
    found = cluster.at_hand()
    assert (found.gpus, found.gpu, found.cpus, found.how) == (0, "", 4, "at hand")
    assert found.places(ResourcesConfig()) == cluster.places(ResourcesConfig()) == 4


def test_too_coarse_for_int8_makes_the_whole_table_bf16(again, local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where parts of an earlier attempt are int8 already."""
    config, folder = again(keep=True)
    cosines = sorted(tables.metadata(path)["cosine"]["vision"] for path in folder.parts())
    assert cosines[0] < cosines[1]
    folder.parts()[-1].unlink()
    monkeypatch.setattr(attach, "FAITHFUL", (cosines[0] + cosines[1]) / 2)  # one part falls short
    attached(config)
    assert json.loads((folder.path / attach.STORAGE).read_text()) == ["vision"]
    for path in folder.parts():
        assert pq.read_schema(path).field("vision").metadata[b"dtype"] == b"uint16"
        assert "vision_scale" not in pq.read_schema(path).names
    assert folder.success()["facts"]["vision"]["vision"]["storage"] == "bf16"
    assert folder.success()["rows_done"] == 24


def test_parts_of_other_hardware_are_refused(again, local_ray: None) -> None:
    config, folder = again(keep=True)
    first, second = folder.parts()[:2]
    tables.write(first, pq.read_table(first), {**tables.metadata(first), "device": "NVIDIA H200"})
    second.unlink()
    with pytest.raises(UserError, match=r"was begun on NVIDIA H200, and this part comes from .*one kind of hardware"):
        attached(config)


def test_an_image_that_can_be_read_again_is_attached_to(whole, again, local_ray: None) -> None:
    """A part that says what could not be read when it was made, and one that a power cut left empty, are made anew."""
    config, folder = again(keep=True)
    first, second = folder.parts()[:2]
    gone = [{"key": "a", "uri": "b", "reason": "there is no such file"}]
    tables.write(first, pq.read_table(first).slice(1), {**tables.metadata(first), "rejected": gone})
    second.write_bytes(b"")
    (folder.path / ".part-000003.parquet.x").write_bytes(b"half")
    attached(config)
    assert content(folder) == content(whole[1])
    assert not list(folder.path.glob(".*"))


def test_other_weights_than_planned_are_refused(whole) -> None:
    config, folder = whole
    encoders = config.attach.encoders()
    given = {
        "encoders": ("vision",), "writes": True, "out": "", "vae": config.vae, "vision": encoders, "int8": {}, "grid": GRID, "flip": True,
        "latents": "", "latents_device": "", "keep_pixels": False, "class_names": None, "device": "cpu", "threads": 1,
    }  # fmt: skip
    with pytest.raises(
        UserError, match=r"attach\.vision\.encoder: the weights on this node \(\w+\) are not those that were planned with \(0123\)"
    ):
        Attacher(**given, weights={"vision": "0123"})
    Attacher(**given, weights={"vision": folder.success()["facts"]["vision"]["vision"]["weights"]})


@pytest.mark.drill("attaching actor killed")
def test_an_actor_killed_while_it_attaches_costs_nothing(
    whole, again, local_ray: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, drill: Drill
) -> None:
    (tmp_path / "actors").mkdir()

    class Slow(Attacher):
        def __init__(self, **given: object):
            super().__init__(**given)  # type: ignore[arg-type]
            (tmp_path / "actors" / str(os.getpid())).touch()

        def __call__(self, batch):
            with (tmp_path / "actors.work").open("a") as file:
                file.write(batch.column("unit")[0].as_py() + "\n")
            time.sleep(0.5)
            return super().__call__(batch)

    monkeypatch.setattr(attach, "Attacher", Slow)
    config, folder = again()
    chaos = Chaos(lambda: len(folder.parts()) >= 2, lambda: os.kill(int(next((tmp_path / "actors").iterdir()).name), signal.SIGKILL))
    chaos.start()
    attached(config)
    chaos.check()
    assert len(list((tmp_path / "actors").iterdir())) == 2, "the actor and one in place of it"
    assert content(folder) == content(whole[1])
    ids = [tables.read(each.parts()).column("sample_id").to_pylist() for each in (folder, whole[1])]
    drill.measured(*ids, redone(tmp_path / "actors", 24))


def test_killed_and_resumed_it_is_the_same_to_the_byte(whole, again, no_ray: None, tmp_path: Path) -> None:
    config, folder = again("resources.rows_per_task=1")
    (tmp_path / "own.yaml").write_text(to_yaml(config))
    process = start("attach", str(tmp_path / "own.yaml"))
    wait_for(lambda: folder.parts(), process)
    kill(process)
    before = {path: path.stat().st_mtime_ns for path in folder.parts()}
    assert not folder.done and 1 <= len(before) < 8, "it was killed too late to test anything"
    attached(config)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was finished stays"
    assert content(folder) == content(whole[1])


def test_only_what_is_asked_for_needs_its_weights(debug_config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Scoring goes on without the encoders that only attaching needs; attaching says which is missing."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    config = debug_config("attach.vision.encoder=dinov2-b", "attach.vision.image_size=0")
    plan = plans.make(config, "score")
    assert [node.stage for node in plan.nodes] == ["manifest", "teacher", "score", "select", "reference"]
    for upto in ("attach", "report"):
        with pytest.raises(UserError, match=r"attach\.vision\.encoder=facebook/dinov2-base: there is no such folder"):
            plans.make(config, upto)


def test_defaults_are_the_published_attachments() -> None:
    config = load(ROOT / "configs" / "imagenet256_sit_l_10k.yaml")
    assert config.attach.text.encoder == "google/flan-t5-xl"
    assert (config.attach.text.tokens, config.attach.vision.encoder, config.attach.vision.image_size) == (16, "dinov2-b", 0)


def test_an_encoder_is_what_its_weights_are(debug_config, tmp_path: Path) -> None:
    """A copy elsewhere makes the same folder, other weights another one."""
    from transformers import Dinov2Config, Dinov2Model

    for name, seed in (("one", 0), ("two", 1)):
        torch.manual_seed(seed)
        Dinov2Model(Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28)).save_pretrained(tmp_path / name)
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    names = {}
    for name in ("one", "copy", "two"):
        config = debug_config(f"attach.vision.encoder={tmp_path / name}", "attach.vision.image_size=0")
        names[name] = plans.make(config, "attach").of("attach")[0].name
    assert names["one"] == names["copy"] != names["two"]


def test_a_dataset_of_fewer_images_is_taken_from_a_larger_one(
    whole, cifar10: Path, models: Path, tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is taken is what attaching to them alone gives; nothing is encoded for it, and its part of that work is charged."""
    fewer = ("select.budget=12", "attach.rows_per_part=5")  # parts that do not lie on the larger one's
    larger = given(cifar10, models, tmp_path / "taken", "attach.rows_per_part=5")
    alone = attached(given(cifar10, models, tmp_path / "alone", *fewer))
    every = attached(larger)
    with monkeypatch.context() as patch:
        patch.setattr(attach, "attach", None)
        patch.setattr(attach, "start_text", None)
        taken = attached(given(cifar10, models, tmp_path / "taken", *fewer))
    assert taken.path.name == alone.path.name
    assert taken.success()["facts"]["taken_from"] == every.path.name
    assert [path.name for path in taken.parts()] == [path.name for path in alone.parts()] and len(taken.parts()) > 2
    for one, other in zip(taken.parts(), alone.parts(), strict=True):
        mine, fresh = pq.read_table(one), pq.read_table(other)
        assert mine.equals(fresh) and mine.schema.equals(fresh.schema)
        assert mine.schema.metadata[b"huggingface"] == fresh.schema.metadata[b"huggingface"]
        told, apart = tables.metadata(one), tables.metadata(other)
        assert told["cosine"]["vision"] <= apart["cosine"]["vision"]
        assert {**told, "cosine": 0} == {**apart, "cosine": 0}
    shipped = {name: content for name, content in content(taken).items() if not name.startswith("part-")}
    assert shipped == {name: content for name, content in content(alone).items() if not name.startswith("part-")}
    assert taken.success()["seconds"] > every.success()["seconds"] / 2
    assert check(taken.path).faults == []


def test_a_larger_dataset_that_needed_bf16_gives_none_that_would_not(whole, again, cifar10: Path, models: Path, local_ray: None) -> None:
    config, folder = again(keep=True)
    success = json.loads((whole[1].path / "_SUCCESS.json").read_text())
    success["facts"]["vision"]["vision"]["storage"] = "bf16"
    (folder.path / "_SUCCESS.json").write_text(json.dumps(success))
    smaller = attached(replace(config, select=replace(config.select, budget=12)))
    assert "taken_from" not in smaller.success()["facts"]
