"""Generated images: what they may not depend on, and the files they are kept in."""

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DEBUG
from PIL import Image
from test_difficulty import teacher

from d2c_ray import config as configuration
from d2c_ray import plan
from d2c_ray.config import SAMPLERS, EvaluateConfig, SampleConfig, VaeConfig
from d2c_ray.data import generated, measured, tables
from d2c_ray.distributed.actors import Sampler
from d2c_ray.errors import UserError
from d2c_ray.evaluate import sampling
from d2c_ray.job import Job
from d2c_ray.models import networks, weights
from d2c_ray.models.transformer import Transformer
from d2c_ray.models.weights import Student
from d2c_ray.rundir import StageDir
from d2c_ray.stages import sample as stage

EVERY = [(name, *of) for of, names in SAMPLERS.items() for name in names]


def student(kind: str, path: str = "linear") -> Student:
    spec = replace(teacher(kind).network.spec, path=path, channels=4)
    torch.manual_seed(0)
    network = Transformer(spec).eval().requires_grad_(False)
    with torch.no_grad():  # a new one predicts zero
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return Student(network, {}, None, None, 1.0)


def latents(model: Student, options: SampleConfig, indices: torch.Tensor) -> torch.Tensor:
    """What `generate` makes, before it is rounded to pixels, which would hide a last bit."""
    kept = []
    sampling.generate(model, options, indices, SimpleNamespace(decode=lambda z: kept.append(z) or z))
    return kept[0]


@pytest.mark.parametrize(("name", "kind", "path"), EVERY)
def test_image_i_depends_on_seed_and_i_alone(name: str, kind: str, path: str) -> None:
    """To the bit, whether it is made alone, with 6 or with 63 others, and wherever among them it stands."""
    model = student(kind, path)
    options = SampleConfig(
        sampler=name, steps=3, device_batch=16, guidance=2.0, guidance_interval=(0.0, 0.7), guidance_channels="three", class_draw="random"
    )
    whole = latents(model, options, torch.arange(64))
    assert whole.shape == (64, 4, 8, 8) and whole.isfinite().all()
    assert torch.equal(torch.cat([latents(model, options, some) for some in torch.arange(64).split(7)]), whole)
    for i in (0, 13, 63):
        assert torch.equal(latents(model, options, torch.tensor([i])), whole[i : i + 1])
    shuffled = torch.tensor([50, 0, 8, 2])
    assert torch.equal(latents(model, options, shuffled), whole[shuffled])
    assert len({tuple(image.flatten().tolist()) for image in whole}) == 64
    assert not torch.equal(latents(model, replace(options, seed=1), torch.tensor([0])), whole[:1])


@pytest.mark.parametrize(("name", "kind", "path"), EVERY)
def test_latents_are_the_same_for_any_device_batch(name: str, kind: str, path: str) -> None:
    """On a CPU, to the last bit, which rounding to 256 levels would hide."""
    model = student(kind, path)
    options = SampleConfig(sampler=name, steps=4, guidance=2.0, class_draw="random")
    whole = latents(model, replace(options, device_batch=64), torch.arange(40))
    for batch in (1, 7):
        assert torch.equal(latents(model, replace(options, device_batch=batch), torch.arange(40)), whole)


@pytest.mark.parametrize("name", ["ddpm", "sde"])
def test_every_step_of_a_stochastic_sampler_has_noise_of_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[int] = []
    own = sampling.image_noise
    monkeypatch.setattr(sampling, "image_noise", lambda seed, indices, draw, shape: draws.append(draw) or own(seed, indices, draw, shape))
    latents(student("dit" if name == "ddpm" else "sit"), SampleConfig(sampler=name, steps=5, device_batch=2), torch.arange(2))
    assert len(draws) == len(set(draws)) == 5 and 0 in draws
    first, second = (own(0, torch.arange(3), draw, (4, 8, 8)) for draw in (0, 1))
    assert not torch.equal(first, second)


def test_guidance_on_the_published_channels_leaves_the_others() -> None:
    """After one step from noise: the first three channels are those of guidance on all, the fourth that of none."""
    model, options = student("sit"), SampleConfig(steps=1, device_batch=4, guidance=4.0)
    three, every, none = (
        latents(model, replace(options, **changes), torch.arange(4)) for changes in ({"guidance_channels": "three"}, {}, {"guidance": 1.0})
    )
    assert torch.equal(three[:, :3], every[:, :3])
    assert not torch.equal(every[:, :3], none[:, :3])
    # The fourth comes from a forward of twice the batch.
    assert torch.allclose(three[:, 3], none[:, 3], atol=1e-5) and not torch.allclose(every[:, 3], none[:, 3], atol=1e-3)


def test_the_interval_is_of_times_for_a_dit_too() -> None:
    """Eleven timesteps, 0 to 999: those of guidance up to 0.5 see noise alone as a sampling without guidance would."""
    model, options = student("dit"), SampleConfig(sampler="ddim", steps=11, device_batch=2, guidance=4.0)

    def rows(interval: tuple[float, float]) -> list[int]:
        seen: list[int] = []
        own = model.network.forward
        model.network.forward = lambda x, t, label, **text: seen.append((int(t[0]), len(x))) or own(x, t, label, **text)  # type: ignore[method-assign]
        latents(model, replace(options, guidance_interval=interval), torch.arange(2))
        model.network.forward = own  # type: ignore[method-assign]
        return [t for t, count in seen if count == 2 * sampling.CPU_BATCH]

    assert rows((0.0, 0.5)) == [500, 400, 300, 200, 100, 0]
    assert rows((0.5, 1.0)) == [999, 899, 799, 699, 599, 500]


def test_a_record_says_what_acted() -> None:
    spec = student("sit").spec
    plain = sampling.facts(SampleConfig(), spec)
    assert (plain["sampler"], plain["guidance"], plain["guidance_interval"], plain["guidance_channels"]) == ("euler", 1.5, None, None)
    limited = SampleConfig(guidance_interval=(0.1, 0.7), guidance_channels="three")
    assert sampling.facts(limited, spec)["guidance_interval"] == [0.1, 0.7] and sampling.facts(limited, spec)["guidance_channels"] == 3
    assert sampling.facts(replace(limited, guidance=1.0), spec) == {**plain, "guidance": 1.0}
    assert sampling.facts(limited, replace(spec, channels=3))["guidance_channels"] is None, "three of three"
    assert json.loads(json.dumps(sampling.facts(limited, spec))) == sampling.facts(limited, spec)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("sample.sampler=ddim", ["model.kind=sit model.path=linear", "euler, heun, sde, dpm-solver++"]),
        ("sample.sampler=dpm-solver++ model.path=cosine", ["model.path=cosine", "euler, heun, sde would do"]),
        ("sample.sampler=heun model.kind=dit", ["model.kind=dit;", "ddpm, ddim, dpm-solver++"]),
        ("sample.sampler=ddmi", ["sample.sampler='ddmi'", "ddim"]),
        ("sample.sampler=dpm-solver++ model.kind=dit sample.steps=1000", ["sample.steps=1000", "999 at most"]),
        ("sample.guidance_interval=[0.7,0.2]", ["sample.guidance_interval=[0.7, 0.2]", "for example [0, 0.7]"]),
        ("sample.guidance_interval=[0,1.5]", ["sample.guidance_interval=[0.0, 1.5]"]),
        ("sample.guidance_channels=four", ["sample.guidance_channels='four'", "all, three"]),
        ("sample.keep=jpg", ["sample.keep='jpg'", "parquet, png, npz, none"]),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(overrides: str, words: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        configuration.load(None, overrides.split())
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize(("name", "kind", "path"), EVERY)
def test_what_fits_is_let_through(name: str, kind: str, path: str) -> None:
    configuration.load(None, [f"sample.sampler={name}", f"model.kind={kind}", f"model.path={path}"])


def test_classes_are_drawn_among_those_that_were_trained() -> None:
    drawn = sampling.draw_labels(torch.arange(3000), torch.tensor([1, 4, 7]), "random", seed=0)
    assert np.bincount(drawn.numpy())[[1, 4, 7]].min() > 900
    assert sampling.draw_labels(torch.arange(4), torch.tensor([1, 4, 7]), "balanced", seed=0).tolist() == [1, 4, 7, 1]


def test_each_of_several_averages_is_sampled_with(tmp_path: Path) -> None:
    network = teacher("sit").network
    state = network.state_dict()
    every = {
        which: {name: value * factor for name, value in state.items()} for which, factor in (("ema", 1.0), ("raw", 0.5), ("ema-0.999", 0.8))
    }
    weights.save(tmp_path, network.spec, every, {"class_names": [], "labels": None}, None)
    sample = SampleConfig(num_images=2, steps=2, device_batch=2)
    images = {which: sampling.generate(weights.load(tmp_path, which), sample, torch.arange(2), None)[1] for which in every}
    assert len({tuple(value.flatten().tolist()) for value in images.values()}) == 3
    assert [weights.decay(which, 0.9999) for which in every] == [0.9999, None, 0.999]


def parts_of(folder: Path, pixels: np.ndarray, labels: np.ndarray, rows: int = 4) -> list[Path]:
    for number, start in enumerate(range(0, len(pixels), rows)):
        table = generated.part(np.arange(start, min(start + rows, len(pixels))), labels[start : start + rows], pixels[start : start + rows])
        tables.write(folder / f"part-{number:06d}.parquet", table, {})
    return StageDir(folder).parts()


@pytest.mark.parametrize("channels", [1, 3])
def test_the_npz_is_what_adms_evaluator_reads(tmp_path: Path, channels: int) -> None:
    """It streams arr_0.npy out of the archive: a header of version 1.0 or 2.0, C order, no objects, uint8 NHWC, then the raw rows."""
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (10, 8, 8, channels), np.uint8), np.arange(10) % 3
    parts, done = parts_of(tmp_path, pixels, labels), []
    generated.write_npz(parts, tmp_path / "samples.npz", 10, done.append)
    assert done == [4, 4, 2]
    expected = pixels.repeat(3, -1) if channels == 1 else pixels
    with np.load(tmp_path / "samples.npz") as found:
        assert set(found.files) == {"arr_0", "arr_1"}
        assert found["arr_0"].dtype == np.uint8 and np.array_equal(found["arr_0"], expected)
        assert found["arr_1"].dtype == np.int64 and found["arr_1"].tolist() == labels.tolist()
    with zipfile.ZipFile(tmp_path / "samples.npz") as archive:
        assert archive.testzip() is None
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        with archive.open("arr_0.npy") as file:
            assert np.lib.format.read_magic(file) == (1, 0)
            assert np.lib.format.read_array_header_1_0(file) == ((10, 8, 8, 3), False, np.dtype(np.uint8))
            assert file.read() == expected.tobytes()
    np.savez(tmp_path / "theirs.npz", expected, labels.astype(np.int64))
    assert (tmp_path / "theirs.npz").stat().st_size == pytest.approx((tmp_path / "samples.npz").stat().st_size, abs=200)


def test_an_npz_of_parts_that_do_not_fit_is_not_written(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, np.zeros((10, 8, 8, 3), np.uint8), np.zeros(10, np.int64))
    for given, count, words in ((parts, 11, "hold 10 images, not 11"), (parts[:1] + parts[2:], 10, "does not go on at image 4")):
        with pytest.raises(ValueError, match=words):
            generated.write_npz(given, tmp_path / "samples.npz", count, lambda rows: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in parts], "no half file"


def test_the_npz_takes_no_copy_of_all_images(tmp_path: Path) -> None:
    import tracemalloc

    pixels = np.zeros((400, 64, 64, 3), np.uint8)  # 4.9 MB
    parts = parts_of(tmp_path, pixels, np.zeros(400, np.int64), rows=20)
    generated.write_npz(parts[:1], tmp_path / "warm.npz", 20, lambda rows: None)
    tracemalloc.start()
    generated.write_npz(parts, tmp_path / "samples.npz", 400, lambda rows: None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < pixels.nbytes / 10


def saved(folder: Path, kind: str = "sit") -> Path:
    """A finished training's folder with a model of grey 8 x 8 pixels."""
    network = teacher(kind).network
    weights.save(folder / "model", network.spec, {"ema": network.state_dict()}, {"class_names": [], "labels": [0, 2, 3]}, None)
    StageDir(folder).finish({"facts": {"images": 64, "ema_decay": 0.999}})
    return folder


def test_with_nothing_kept_the_parts_hold_what_the_networks_see(tmp_path: Path) -> None:
    model, unit = str(saved(tmp_path) / "model"), {"unit": 3, "start": 8, "stop": 13}
    evaluate = EvaluateConfig(network="efficientnet-lite2", more_networks=["efficientnet-lite0"], image_size=64, device_batch=4)
    options = SampleConfig(steps=2, device_batch=4)
    for keep in ("parquet", "none"):
        out = tmp_path / keep
        planned = {name: networks.facts(name, evaluate)["weights"] for name in networks.names(evaluate)} if keep == "none" else {}
        assert Sampler(model, str(out), options, VaeConfig(), evaluate, planned, "cpu", 1).run(unit) == {"rows": 5}
    with pytest.raises(UserError, match="weights on this node"):
        Sampler(model, str(tmp_path), options, VaeConfig(), evaluate, {"efficientnet-lite2": "0" * 16}, "cpu", 1)
    with_images, alone = (tables.read(tmp_path / keep / "part-000003.parquet") for keep in ("parquet", "none"))
    assert alone.schema.names == ["index", "label", "efficientnet-lite2", "efficientnet-lite0"]
    for column in ("index", "label"):
        assert alone.column(column) == with_images.column(column)
    assert alone.column("label").to_pylist() == [[0, 2, 3][i % 3] for i in range(8, 13)]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image)))[..., None] for image in with_images.column("image").to_pylist()])
    for name in networks.names(evaluate):
        found = tables.tensor_values(alone, name)
        assert found.dtype == np.float32 and found.shape == (5, 1280)
        assert np.array_equal(found, networks.load(name, evaluate, torch.device("cpu")).features(pixels)), "as of images read back"


def test_what_is_measured_reads_the_parts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    both = rng.random((3, 12), np.float32)  # a network's output may be cut into two, so that neither lies in one piece
    table = generated.part_of_features(np.arange(5, 8), np.zeros(3), {"inception": both[:, :8], measured.PROBABILITIES: both[:, 8:]})
    tables.write(tmp_path / "part.parquet", table, {})
    back = measured.read([tmp_path / "part.parquet"], "inception")
    assert back.ids.tolist() == [5, 6, 7] and back.labels.tolist() == [0, 0, 0]
    assert np.array_equal(back.features, both[:, :8]) and np.array_equal(back.probabilities, both[:, 8:])


def test_what_is_kept_names_the_folder_and_so_do_networks_where_nothing_is() -> None:
    def hashed(*overrides: str) -> str:
        return json.dumps(plan._sample(configuration.load(DEBUG, ["attach.vision.encoder=none", "train.align_weight=0", *overrides])))

    assert len({hashed(f"sample.keep={keep}") for keep in ("parquet", "png", "npz", "none")}) == 4
    for change in (
        "evaluate.image_size=80",
        "evaluate.device_batch=5",
        "evaluate.network=efficientnet-lite0",
        "evaluate.more_networks=[efficientnet-lite0]",
    ):
        assert hashed("sample.keep=none", change) != hashed("sample.keep=none"), change
        assert hashed("sample.keep=png", change) == hashed("sample.keep=png"), change
    assert hashed("sample.keep=none", "evaluate.neighbours=2") == hashed("sample.keep=none")


def sampled(trained: Path, out: Path, *overrides: str) -> Path:
    """The stage on a saved model."""
    config = configuration.load(
        DEBUG, ["sample.num_images=20", "sample.device_batch=2", "sample.steps=3", "sample.sampler=sde", "sample.guidance=2", *overrides]
    )
    out.mkdir(exist_ok=True)
    result = stage.run(Job(config, {"train": StageDir(trained)}, out, "0" * 8, "sample"))
    assert result.rows_done == 20
    return out


@pytest.mark.xdist_group("ray")
def test_two_actors_make_the_same_images_and_finish_what_one_began(
    tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "CPU_BATCH", 2)  # in this process, which cuts the work: several parts of few images
    trained = saved(tmp_path / "train")
    out = sampled(trained, tmp_path / "samples", "resources.actors=1", "sample.keep=png")
    parts = StageDir(out).parts()
    whole = {path.name: tables.read(path) for path in parts}
    assert [len(table) for table in whole.values()] == [4] * 5
    pictures = {path.name: path.read_bytes() for path in sorted((out / "images").iterdir())}
    assert list(pictures) == [f"{i:06d}.png" for i in range(20)]
    assert list(pictures.values()) == [image for table in whole.values() for image in table.column("image").to_pylist()]
    assert len(set(pictures.values())) == 20
    # As a killed attempt leaves it: parts missing, halves of files under temporary names.
    for path in (parts[0], parts[2], parts[3]):
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in StageDir(out).parts()}
    halves = [out / ".part-000002.parquet.x1y2", out / "images" / ".000003.png.x1y2", out / ".samples.npz.x1y2"]
    for half in halves:
        half.write_bytes(b"half")
    sampled(trained, out, "resources.actors=2", "sample.keep=npz")
    assert {path.name: tables.read(path) for path in StageDir(out).parts()} == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "parts that were there were made again"
    assert not any(half.exists() for half in halves)
    with np.load(out / "samples.npz") as found:
        assert [image.tobytes() for image in found["arr_0"]] == [
            np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).tobytes() for image in pictures.values()
        ]
        assert found["arr_1"].tolist() == [[0, 2, 3][i % 3] for i in range(20)]
    before = (out / "samples.npz").stat().st_mtime_ns
    sampled(trained, out, "sample.keep=npz")
    assert (out / "samples.npz").stat().st_mtime_ns == before


@pytest.mark.parametrize("left", [0, 500])
def test_half_a_part_is_sampled_again(tmp_path: Path, left: int) -> None:
    """What a power cut leaves of a file whose name had reached the disk."""
    from d2c_ray.data import generated, tables
    from d2c_ray.stages import sample

    unit, part = {"unit": 0, "start": 0, "stop": 4}, tmp_path / "part-000000.parquet"
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    tables.write(part, generated.part(np.arange(4), np.zeros(4, int), pixels), {"unit": unit})
    assert sample._there(part, unit) and not sample._there(part, {**unit, "stop": 5})
    part.write_bytes(part.read_bytes()[:left])
    assert not sample._there(part, unit)
