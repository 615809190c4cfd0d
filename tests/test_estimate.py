"""`d2c plan`: its arithmetic against numbers worked out by hand, published ones, and what autograd really keeps."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from conftest import DEBUG, ROOT

from d2c_ray import cli, estimate, forecast, hardware, pipeline, rates
from d2c_ray import plan as plans
from d2c_ray.config import Config, VisionConfig, arm_configs, load, pools
from d2c_ray.data import tables
from d2c_ray.distributed import cluster
from d2c_ray.errors import UserError
from d2c_ray.estimate import Data
from d2c_ray.models.transformer import Transformer, TransformerSpec
from d2c_ray.report import estimate as printed
from d2c_ray.report import gather
from d2c_ray.rundir import write_json

IMAGENET = Data(1_281_167, 1000)
# Budget, k, batch, steps, depth and width: the paper's tables 1 to 3; XL at 100K and DiT-XL are not in it, and said so.
ROWS = {
    f"imagenet256_{kind}_{size}_{name}": (kind, 256, images, k, *run, *shape)
    for kind in ("dit", "sit")
    for name, images, k, xl_steps in (("10k", 10_000, 96, 40_000), ("50k", 50_000, 16, 180_000), ("100k", 100_000, 10, 180_000))
    for size, run, shape in (("l", (128, 100_000), (24, 1024)), ("xl", (256, xl_steps), (28, 1152)))
} | {f"imagenet512_{kind}_l_10k": (kind, 512, 10_000, 96, 256, 100_000, 24, 1024) for kind in ("dit", "sit")}


@pytest.fixture(autouse=True)
def nothing_at_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub and an empty cache of it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


def imagenet(*overrides: str) -> Config:
    return load(ROOT / "configs" / "imagenet256_sit_l_10k.yaml", overrides)


def test_there_is_a_preset_for_every_row() -> None:
    assert {path.stem for path in (ROOT / "configs").glob("imagenet*_*.yaml")} == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_presets_are_the_papers_rows(name: str) -> None:
    kind, size, images, k, batch, steps, depth, width = ROWS[name]
    config = load(ROOT / "configs" / f"{name}.yaml")
    assert (config.select.selector, config.select.budget, config.select.k) == ("interval", images, k)
    assert (config.train.batch_size, config.train.num_images) == (batch, batch * steps)
    assert (config.data.image_size, config.data.flip, config.model.kind, config.model.path) == (size, True, kind, "linear")
    assert (config.train.ema_decay, config.train.align_weight, config.train.lr) == (0.9999, 0.5, 1e-4)
    assert (config.sample.num_images, config.sample.steps, config.sample.guidance, config.sample.weights) == (50_000, 250, 1.5, "ema")
    assert (config.attach.text.encoder, config.attach.text.tokens, config.attach.vision.encoder) == ("google/flan-t5-xl", 16, "dinov2-b")
    assert config.vae.path == config.teacher.checkpoint == f"facebook/DiT-XL-2-{size}"
    found = forecast.collect(config)
    student = found["students"]["student"]
    assert (student["images"], student["of"], student["steps"]) == (images, 1_281_167, steps)
    assert (student["model"]["depth"], student["model"]["width"]) == (depth, width)
    assert not any(stage["folder"] or stage["done"] for stage in found["stages"]) and "data.path" in found["no_stages"]
    assert any(line.startswith("assumed: facebook/DiT-XL-2-") for line in printed.lines(found))


@pytest.mark.parametrize(
    ("kind", "size", "millions", "macs"), [("dit", "XL", 675.1, 118.64e9), ("dit", "L", 458.1, 80.71e9), ("sit", "B", 130.5, 23.01e9)]
)
def test_parameters_and_macs_are_the_published_ones(kind: str, size: str, millions: float, macs: float) -> None:
    """DiT (arXiv 2212.09748), table 4, where the fixed positions count too; a SiT lacks the half of the output that is DiT's variance."""
    config = imagenet(f"model.kind={kind}", f"model.size={size}", "attach.text.encoder=none", "attach.vision.encoder=none")
    model = estimate.student(config, IMAGENET)["model"]
    assert model["parameters"] == model["parameters_plain"]
    assert (model["parameters"] + 256 * model["width"]) / 1e6 == pytest.approx(millions, abs=0.05)
    assert model["macs_forward"] == pytest.approx(macs, rel=2e-3)


def test_bytes_by_hand() -> None:
    """METHOD: 393 KB an image of bf16 tokens and 32 KB of latents at 256 px; four times that at 512."""
    size = estimate.student(imagenet(), IMAGENET)["bytes"]
    assert size["an_image"] == {
        "sides": 2, "pixels": 256 * 256 * 3, "latents": 2 * 2 * 4 * 32 * 32 * 2, "tokens": {"vision": {"bf16": 2 * 393_216, "int8": 2 * 256 * (768 + 4)}},
    }  # fmt: skip
    assert size["dataset"]["latents"] == 10_000 * 32_768 and size["dataset"]["pixels"] == 0
    assert size["dataset"]["tokens"] == 10_000 * 395_264
    assert size["cache"] == 10_000 * (32_768 + 395_264 + 16)
    large = load(ROOT / "configs" / "imagenet512_sit_l_10k.yaml")
    assert estimate.student(large, IMAGENET)["bytes"]["an_image"]["tokens"]["vision"]["bf16"] == 2 * 4 * 393_216
    wide = estimate.student(imagenet("attach.vision.storage=bf16", "data.flip=false"), IMAGENET)["bytes"]
    assert wide["dataset"]["tokens"] == 10_000 * 393_216


def test_full_data_stored_and_encoded_while_training() -> None:
    """504 GB a flip in bf16; 252 GB of pixels instead, and nothing else where latents are encoded too."""
    full = ("select.selector=all", "attach.vision.encode=training")
    stored = estimate.student(imagenet("select.selector=all"), IMAGENET)
    assert stored["images"] == 1_281_167
    assert stored["bytes"]["either_way"]["tokens_bf16_a_flip"] == 1_281_167 * 393_216 == 503_775_363_072
    vision = estimate.student(imagenet(*full), IMAGENET)["bytes"]
    assert (vision["dataset"]["tokens"], vision["dataset"]["pixels"]) == (0, 1_281_167 * 196_608)
    assert vision["cache"] == 1_281_167 * (196_608 + 32_768 + 16)
    both = estimate.student(imagenet(*full, "vae.encode=training"), IMAGENET)
    assert both["bytes"]["dataset"]["total"] == 1_281_167 * 196_608 and both["bytes"]["cache"] == 1_281_167 * (196_608 + 16)
    assert both["in_training"] == ["latent", "vision"]
    text = "\n".join(printed.lines(forecast.collect(imagenet("select.selector=all"))))
    assert "1.008 TB in bf16 (503.8 GB a flip)" in text and "251.9 GB of pixels" in text
    plain = estimate.student(imagenet(*full, "train.align_weight=0"), IMAGENET)["bytes"]
    assert plain["cache"] == 1_281_167 * (32_768 + 16), "pixels that nothing encodes are not opened"


H100 = hardware.Device("NVIDIA H100 80GB HBM3", True)


def seconds(config: Config, mfu: float | None = 0.5, entries: list[dict] | None = None) -> dict[str, float]:
    """Of an image of training on an H100, by piece."""
    return {what: rate.seconds for what, rate in rates.Rates(entries or [], mfu).image("train", config, IMAGENET, H100)}


def test_flops_and_hours_by_hand() -> None:
    config = imagenet("attach.text.encoder=none", "attach.vision.encoder=none", "vae.encode=training")
    found = estimate.student(config, IMAGENET)
    model = 6 * found["model"]["macs_forward"] * 12_800_000
    assert found["compute"]["model"] == model
    vae = 2 * 136.36e9 * 12_800_000  # counted by torch on Stable Diffusion's encoder at 256 px
    assert found["compute"]["encoders"]["facebook/DiT-XL-2-256"] == pytest.approx(vae, rel=1e-4)
    each = {what: value * 12_800_000 for what, value in seconds(config).items()}
    assert each == {
        "train": pytest.approx(model / 989.4e12 / 0.5),
        "encode": pytest.approx(vae / 66.9e12 / 0.5, rel=1e-4),
    }  # the VAE in fp32
    recomputed = estimate.student(imagenet("resources.recompute=true"), IMAGENET)["compute"]
    assert recomputed["model"] * 3 == estimate.student(imagenet(), IMAGENET)["compute"]["model"] * 4
    half = estimate.student(imagenet("train.align_until=6400000", "attach.vision.encode=training"), IMAGENET)["compute"]
    whole = estimate.student(imagenet("attach.vision.encode=training"), IMAGENET)["compute"]
    assert half["encoders"]["dinov2-b"] * 2 == whole["encoders"]["dinov2-b"]
    # ViT-B/14 of 224 px: 257 tokens through 12 blocks of 12 width^2 and attention, and 256 patches of 588 numbers.
    assert estimate.vision_macs(VisionConfig(), 16) == 256 * 588 * 768 + 12 * (257 * 12 * 768**2 + 2 * 257**2 * 768)
    unknown = estimate.student(imagenet("attach.vision.encoder=some/encoder", "attach.vision.encode=training"), IMAGENET)
    assert unknown["compute"]["unknown"] == ["some/encoder"] and any("width of some/encoder" in what for what in unknown["assumed"])


def test_a_model_that_is_not_trained_costs_nothing() -> None:
    """Sampled and measured as it starts, with encoders that would run while training."""
    config = imagenet("train.num_images=0", "train.start=SiT-L-2-256.pt", "vae.encode=training", "attach.vision.encode=training")
    found = forecast.collect(config, forecast.Asked(hardware.described("H100")))
    (student,) = found["students"].values()
    assert (student["steps"], student["compute"]["total"], seconds(config)) == (0, 0, {})
    (train,) = [row for row in found["stages"] if row["stage"] == "train"]
    assert [part["what"] for part in train["parts"]] == ["starting"] and "train" not in found["memory"]
    text = "\n".join(printed.lines(found))
    assert "training: 0 FLOPs" in text and "% of it " not in text


def test_weights_moments_and_checkpoints_are_exact(tmp_path: Path) -> None:
    """Against a real state of the loop."""
    from test_training import CONFIG, Run, spec

    run = Run(tmp_path, CONFIG)
    count = sum(parameter.numel() for parameter in run.model.parameters())
    assert estimate.parameters(spec()) == count
    written = (run.states[12] / "state.safetensors").stat().st_size
    assert 0 < written - estimate.checkpoint_bytes(count, CONFIG) < 30_000, "but for the header"
    config = imagenet("train.ema_also=[0.999]", "train.keep_every=1280000", "resources.train_workers=4")
    found = estimate.student(config, IMAGENET)
    count = found["model"]["parameters"]
    assert [found["memory"][name] // count for name in ("weights", "gradients", "moments", "ema")] == [4, 4, 8, 8]
    assert found["memory"]["micro_batch"] == 32
    assert found["bytes"]["checkpoint"] == 20 * count and found["bytes"]["checkpoints"] == 20 * count * (2 + 10)
    assert found["bytes"]["model"] == 12 * count


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize(("kind", "depth", "width", "heads", "batch"), [("sit", 3, 64, 4, 8), ("dit", 1, 96, 2, 5)])
def test_activations_are_what_autograd_keeps(kind: str, depth: int, width: int, heads: int, batch: int, attached: bool, bf16: bool) -> None:
    sides = {"text_tokens": 4, "text_width": 24, "vision_width": 40, "align_depth": 1, "align_hidden": 48} if attached else {}
    spec = TransformerSpec(kind, 16, 4, 2, depth, width, heads, 10, **sides)
    assert estimate.activations(spec, batch, bf16, features=False) == saved(spec, batch, bf16, False)
    if attached:
        loss = batch * 64 * 8 * 40  # not of the network
        assert estimate.activations(spec, batch, bf16) - loss == saved(spec, batch, bf16, True)


def saved(spec: TransformerSpec, batch: int, bf16: bool, features: bool) -> int:
    """Bytes of all that a forward saves for backward, each storage once, without the parameters themselves."""
    torch.manual_seed(0)
    model = Transformer(spec)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other takes its place
        return tensor

    text = {"text": torch.randn(batch, 4, 24), "text_mask": torch.ones(batch, 4)} if spec.text_tokens else {}
    x, t, label = torch.randn(batch, 4, 16, 16), torch.rand(batch), torch.arange(batch)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        _out = model(x, t, label, features=features, **text)
    return sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in own)


def test_recompute_keeps_the_inputs_of_blocks_and_one_block() -> None:
    spec = TransformerSpec("sit", 16, 4, 2, 12, 64, 4, 10)
    plain, less = (estimate.activations(spec, 8, False, recompute) for recompute in (False, True))
    one = (estimate.activations(TransformerSpec("sit", 16, 4, 2, 13, 64, 4, 10), 8, False)) - plain
    assert plain - less == 11 * one - 12 * 8 * 64 * 64 * 4


def test_with_the_data_at_hand_it_names_the_stages(debug_config) -> None:
    config = debug_config("arms.Full={select: {selector: all}}", "arms.D2C={}")
    before = forecast.collect(config)
    assert not any(stage["done"] for stage in before["stages"])
    assert not (Path(config.run.dir) / config.run.name).exists(), "nothing was written"
    pipeline.run(config, "manifest", say=lambda text: None)
    found = forecast.collect(config)
    assert [stage["stage"] for stage in found["stages"] if stage["done"]] == ["manifest"]
    assert {stage["stage"] for stage in found["stages"]} >= {"teacher", "score", "select", "attach", "train", "evaluate"}
    assert (found["students"]["Full"]["images"], found["students"]["D2C"]["images"], found["students"]["D2C"]["of"]) == (120, 40, 120)
    assert found["students"]["D2C"]["assumed"] == []


def test_encoders_are_charged_at_the_peak_of_their_own_precision() -> None:
    """An hour of a device in fp32 computes what minutes of it do in bf16."""
    config = imagenet("select.selector=all", "attach.vision.encode=training")
    found = estimate.student(config, IMAGENET)["compute"]
    each = {what: value * 12_800_000 for what, value in seconds(config).items()}
    assert each == {
        "train": pytest.approx(found["model"] / 0.5 / 989.4e12),
        "vision": pytest.approx(found["encoders"]["dinov2-b"] / 0.5 / 66.9e12),
    }


def test_the_largest_share_of_uneven_workers_is_counted() -> None:
    own = load(ROOT / "configs" / "imagenet256_sit_l_10k.yaml", ["resources.train_workers=3"])  # 8 blocks of 16: 2, 3 and 3
    assert estimate.student(own, IMAGENET)["memory"]["micro_batch"] == 48


def test_the_command_prints_numbers_or_lines(capsys: pytest.CaptureFixture[str]) -> None:
    large = [str(ROOT / "configs" / "imagenet256_sit_l_10k.yaml"), "--gpus", "A100", "--mfu", "0.3", "--price", "2"]
    for args in ([str(DEBUG), "data.source=folder", "select.budget=0.01", "--json"], large):
        with pytest.raises(SystemExit) as ended:
            cli.main(["plan", *args])
        assert not ended.value.code
    as_json, text = capsys.readouterr().out.split("\nit does not fit as it stands: ")
    assert json.loads(as_json)["students"]["student"]["images"] == 120  # of the 12 a class that the file allows, of 1,000 classes
    assert (
        "assumed: 30% of A100's 312.0 TFLOP/s in bf16" in text
        and "price: " in text
        and "stages, on 1 x A100 and 8 CPU cores (described)" in text
    )
    for wrong, words in (
        (("--gpus", "Abacus"), "--gpus Abacus: no peak in fp32 is known of it, and d2c bench measured nothing on one"),
        (("--gpus", "H100x8"), "--gpus H100x8: the number stands in front, and 8xH100 would do"), (("--gpus", "RTX 4090 x 2"), "2xRTX 4090 would do"),
        (("--gpus", "H100 x8"), "8xH100 would do"), (("--gpus", "2xH100 x8"), "a number of GPUs of one kind"), (("--gpus", "Abacusx8"), "no peak in fp32 is known of it"),
        (("--gpus", ""), "--gpus is empty, as of a variable that is not set; 8xH100 would do"), (("--gpus", " "), "--gpus is empty"),
        (("--address", ""), "--address is empty"),
        (("--mfu", "7", "--gpus", "H100"), "--mfu 7"), (("--gpus", "2xH100,8xL4"), "a number of GPUs of one kind"), (("--gpus", "0xH100"), "a number of GPUs"),
        (("--cpus", "4", "--price", "1"), "--price 1 is of a GPU-hour"), (("--address", "auto", "--gpus", "H100"), "one of the two would do"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            cli.main(["plan", str(DEBUG), *wrong])
        assert ended.value.code == 2, wrong
        assert words in capsys.readouterr().err
    with pytest.raises(UserError, match="asks for 5000 images; there are 400"):
        forecast.collect(load(DEBUG, ["data.source=folder", "select.budget=5000"]), forecast.Asked(images=400))


def test_arms_of_the_paper_preset_on_all_images() -> None:
    config = load(ROOT / "configs" / "cifar10_paper.yaml")
    assert arm_configs(config)["Full"].select.selector == "all"
    found = forecast.collect(config, forecast.Asked(images=50_000))["students"]
    assert (found["Full"]["images"], found["D2C"]["images"]) == (50_000, 1000)
    assert found["Full"]["shown"] == found["D2C"]["shown"], "at equal training"


# Stages on a cluster


def row(found: dict, stage: str) -> dict:
    (only,) = [one for one in found["stages"] if one["stage"] == stage]
    return only


def test_every_stage_by_hand() -> None:
    """A SiT-L/2 on 8 H100 at half their peak: FLOPs from the published GMACs, paces from the table."""
    config = imagenet(
        "attach.text.encoder=none",
        "attach.vision.encoder=none",
        "train.align_weight=0",
        "resources.train_workers=8",
        "teacher.checkpoint=DiT-XL-2-256x256.pt",
    )
    found = forecast.collect(config, forecast.Asked(hardware.described("8xH100", 200), mfu=0.5, price=3.0))
    assert [one["stage"] for one in found["stages"]] == [
        "manifest",
        "teacher",
        "score",
        "select",
        "attach",
        "train",
        "sample",
        "reference",
        "evaluate",
    ]
    parts = {one["stage"]: {part["what"]: part["seconds"] for part in one["parts"]} for one in found["stages"]}
    bf16, fp32, import_sec = 0.5 * 989.4e12, 0.5 * 66.9e12, 17 / 2.5
    student = found["students"]["student"]["model"]["macs_forward"]
    assert student == pytest.approx(80.71e9, rel=2e-3)
    assert parts["train"] == {"starting": pytest.approx(3 * import_sec), "train": pytest.approx(12_800_000 * 6 * student / bf16 / 8)}
    assert row(found, "train")["gpu_hours"] == pytest.approx(8 * sum(parts["train"].values()) / 3600)
    share = row(found, "score")["places"]
    levels = config.score.num_timesteps
    at = {"bf16": bf16, "fp32": fp32}[config.score.precision]
    assert parts["score"]["forward"] == pytest.approx(1_281_167 * levels * 2 * 118.64e9 / at / share, rel=2e-3)
    assert parts["score"]["encode"] == pytest.approx(1_281_167 * 2 * 136.36e9 / fp32 / share, rel=1e-3)
    assert parts["attach"]["encode"] == pytest.approx(2 * 10_000 * 2 * 136.36e9 / fp32 / row(found, "attach")["places"], rel=1e-3), (
        "both flips"
    )
    steps = 250 * 2 * 2 * student / fp32 + 2 * (4_730_528 * 65536 + 65536**2 / 4) / fp32  # guided: two forwards a step; the VAE's decoder
    assert parts["sample"]["sample"] + parts["sample"]["decode"] == pytest.approx(50_000 * steps / row(found, "sample")["places"], rel=1e-3)
    assert parts["manifest"]["listing"] == pytest.approx(64.06, abs=0.01)
    total = found["total"]
    assert total["rented_gpu_hours"] == pytest.approx(8 * total["seconds"] / 3600) and total["price"] == pytest.approx(
        3 * total["rented_gpu_hours"]
    )
    assert {row(found, stage)["source"] for stage in ("score", "train", "sample")} == {"assumed"}
    assert row(found, "train")["said"] == "50% of H100's 989.4 TFLOP/s in bf16"
    assert [(part["what"], part["source"]) for part in row(found, "select")["parts"]] == [
        ("starting", "assumed"),
        ("choosing", "published"),
    ]
    assert found["source_bytes"] == {
        "bytes": pytest.approx(147_897_477_120),
        "source": "assumed",
        "said": "ImageNet's training set, as published",
    }
    by_name = forecast.collect(config, forecast.Asked(hardware.described("A100")))
    assert row(by_name, "train")["source"] == "published" and "fast-DiT's README" in row(by_name, "train")["said"]


def test_stages_run_side_by_side_as_a_run_starts_them() -> None:
    """A training waits for its dataset alone; what could start together shares the places that are left."""
    config = load(ROOT / "configs" / "quickstart.yaml", ["resources.actors=4"])
    nodes = forecast.every_node(forecast.Resolved.of(config), None)
    assert [(node.stage, node.arms) for node in nodes if node.stage in ("score", "select", "train")] == [
        ("score", ["D2C", "Random+Attach"]), ("select", ["D2C"]), ("select", ["Random+Attach"]), ("train", ["D2C"]), ("train", ["Random+Attach"]),
    ]  # fmt: skip
    took = {
        "manifest": 1.0,
        "teacher": 10.0,
        "reference": 5.0,
        "score": 4.0,
        "select": 1.0,
        "attach": 2.0,
        "train": 20.0,
        "sample": 3.0,
        "evaluate": 2.0,
    }
    shares, total = forecast.schedule(nodes, lambda node, share: took[node.stage], 4)
    assert total == 1 + 10 + 4 + 1 + 2 + 20 + 3 + 2
    each = {node.stage: shares[node.name] for node in nodes}
    assert (each["teacher"], each["reference"], each["score"], each["train"], each["sample"]) == (1, 1, 4, 1, 2)


def test_what_only_measuring_waits_for_leaves_its_places_to_what_students_wait_for() -> None:
    """A teacher that is looked at for a moment leaves seven GPUs to the reference, and scoring would have to do with the eighth."""
    config = load(ROOT / "configs" / "imagenet256_sit_xl_50k.yaml", ["resources.actors=8"])
    nodes = forecast.every_node(forecast.Resolved.of(config), None)
    took = {"teacher": 1.0, "score": 8000.0, "reference": 3000.0}
    shares, total = forecast.schedule(nodes, lambda node, share: took.get(node.stage, 10.0) / share, 8)
    each = {node.stage: shares[node.name] for node in nodes}
    assert (each["reference"], each["score"]) == (1, 7)
    assert total < 3000 + 100
    alone = [node for node in nodes if node.stage in ("manifest", "reference", "evaluate")]
    shares, _ = forecast.schedule(alone, lambda node, share: took.get(node.stage, 10.0) / share, 8)
    assert {shares[node.name] for node in alone if node.stage == "reference"} == {8}


def fits(*overrides: str, **asked: float) -> tuple[list[dict], list[str]]:
    found = forecast.collect(
        load(ROOT / "configs" / "imagenet256_sit_xl_50k.yaml", overrides), forecast.Asked(hardware.described("8xL4"), **asked)
    )
    return found["problems"], printed.lines(found)


def test_what_does_not_fit_is_said_and_what_is_proposed_fits() -> None:
    """Proposals are taken one after the other until nothing is left: they are what a user would do."""
    taken = ["resources.train_workers=16", "train.keep_every=4608000", "resources.actors=9"]
    left, lines = fits(*taken, disk=100e9, cache=15e9)
    assert [problem["what"] for problem in left] == [
        "resources.actors=9", "resources.train_workers=16", "the memory of a training step", "the run folder", "a node's copy to train from",
    ]  # fmt: skip
    assert any(
        line.startswith("does not fit: resources.train_workers=16 wants 16 GPUs; the cluster has 8: resources.train_workers=8 would do")
        for line in lines
    )
    for _ in range(9):
        if not left:
            break
        assert left[0]["would"], left[0]
        taken += left[0]["would"]
        left, _ = fits(*taken, disk=100e9, cache=15e9)
    assert not left, taken
    assert "resources.train_workers=8" in taken and "train.keep_every=0" in taken and "attach.vision.encode=training" in taken
    assert any(change.startswith("resources.micro_batch=") for change in taken), "16 GB of state leave little of an L4's 24 GB"


def test_what_nothing_makes_fit_is_said() -> None:
    """A T4 holds no XL: state alone takes 14.5 GB."""
    config = load(ROOT / "configs" / "imagenet256_sit_xl_50k.yaml", ["train.precision=fp32"])
    found = forecast.collect(config, forecast.Asked(hardware.described("T4"), disk=1e9))
    memory, disk = found["problems"]
    state = 20 * found["students"]["student"]["model"]["parameters"]
    assert (
        memory["has"] == 0.9 * 16e9 and memory["wants"] > state and not memory["would"] and memory["else_would"].startswith("a device of ")
    )
    assert not disk["would"] and disk["else_would"].startswith("a disk with ")
    (memory,) = forecast.collect(config, forecast.Asked(hardware.described("A100-80GB")))["problems"]
    assert memory["has"] == 0.9 * 80e9 and memory["would"] == ["resources.micro_batch=64"], "a name may say its memory"


def test_what_was_planned_is_kept_once_a_stage_has_begun(debug_config) -> None:
    """Whatever is known later, or on another cluster: a plan that is changed afterwards would be no plan."""
    config = debug_config()
    plan = plans.make(config)
    nodes = [node for node in plan.nodes if node.stage != "manifest"]
    train, score = plan.of("train")[0], plan.of("score")[0]
    score.folder.mkdir(parents=True)  # begun by an older version, which kept nothing
    cores = hardware.Cluster(0, "", 2, "a core", hardware.AT_HAND)
    first = forecast.planned(plan, nodes, cores, 2)
    assert set(first) == {node.name for node in nodes} - {score.name}
    assert first[train.name]["source"] == "assumed", "starting is most of it, and fitted"
    assert first[train.name]["images"] == 512
    write_json(plan.folder / "plan.json", {"planned": first})
    train.folder.mkdir()
    later = forecast.planned(plan, nodes, hardware.Cluster(8, "H100", 64, "a core", hardware.AT_HAND), 8)
    assert later[train.name] == first[train.name] and score.name not in later
    assert later[plan.of("sample")[0].name]["device"] == "H100"


def test_what_waits_for_gpus_that_come_on_demand_is_not_known(debug_config) -> None:
    """Planned on the one core of a head node, it would take years, and that would stand beside what it took for good."""
    config = debug_config("resources.autoscaling=true", "resources.actors=8", "resources.gpus_per_actor=1", "resources.train_workers=2")
    pipeline.run(config, "manifest", say=lambda text: None)
    head = hardware.Cluster(0, "", 1, "a core", hardware.AT_HAND)
    found = forecast.collect(config, forecast.Asked(head))
    unknown = {one["stage"] for one in found["stages"] if one["seconds"] is None and not one["done"]}
    assert unknown == {"teacher", "score", "attach", "train", "sample", "reference", "evaluate"} == set(found["total"]["not_known"])
    assert row(found, "train")["device"] == "GPU" and row(found, "select")["seconds"] > 0
    text = "\n".join(printed.lines(found))
    assert "in all: not known" in text and "GPUs that come on demand, --gpus says" in text and "does not fit" not in text
    plan = plans.make(config)
    write_json(plan.folder / "plan.json", {"planned": {plan.of("train")[0].name: {"seconds": 1e7}}})  # of another cluster, and not begun
    kept = forecast.planned(plan, [node for node in plan.nodes if node.stage != "manifest"], head, 8)
    assert set(kept) == {plan.of("select")[0].name}
    as_described = forecast.collect(config, forecast.Asked(hardware.described("8xH100")))
    assert not as_described["total"]["not_known"]


def test_a_manifest_is_read_a_part_at_a_time_and_by_a_run_not_at_all(debug_config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lengths alone take 80 GB of ten billion images."""
    config = debug_config()
    pipeline.run(config, "manifest", say=lambda text: None)
    plan = plans.make(config)
    (manifest,) = plan.of("manifest")
    lengths = []
    for number, values in enumerate(([100, 200], [300, 600, 300])):
        tables.write(manifest.folder / f"part-{number:06d}.parquet", pa.table({"length": values}), {})
        lengths += values
    for stale in set(manifest.dir.parts()) - {manifest.folder / f"part-{number:06d}.parquet" for number in range(2)}:
        stale.unlink()
    read: list[object] = []
    monkeypatch.setattr(tables, "read", lambda paths, columns=None, own=tables.read: read.append(paths) or own(paths, columns))
    facts, each = forecast._manifest(plan)
    assert facts is not None and (facts["rows"], each) == (120, sum(lengths) / 5)
    assert read == manifest.dir.parts()
    read.clear()
    forecast.planned(
        plan, [node for node in plan.nodes if node.stage != "manifest"], hardware.Cluster(0, "", 2, "a core", hardware.AT_HAND), 2
    )
    assert not read
    tables.write(manifest.folder / "part-000001.parquet", pa.table({"length": [-1]}), {})
    assert forecast._manifest(plan)[1] is None


@pytest.mark.parametrize(
    ("nodes", "overrides", "words"),
    [
        ([(2.0, 0.0)], ["resources.actors=2"], "resources.actors=2 wants 3 CPUs, one of them to decode on; the cluster has 2: resources.actors=1 would do"),
        ([(8.0, 1.0)], ["resources.actors=2"], "resources.actors=2 wants 2 GPUs; the cluster has 1: resources.actors=1 would do"),
        ([(1.0, 2.0), (8.0, 0.0)], ["resources.actors=2"], "resources.actors=2 wants 2 places of 1 CPU and 1 GPU; the cluster has 1: resources.actors=1 would do"),
        ([(1.0, 1.0)], ["resources.actors=1"], "resources.actors=1 wants 2 CPUs, one of them to decode on; the cluster has 1: a larger cluster would do"),
        ([(4.0, 0.0)], ["resources.actors=1", "resources.train_workers=5", "train.batch_size=80"], "resources.train_workers=5 wants 5 CPUs; the cluster has 4: resources.train_workers=4"),
        ([(4.0, 0.0)], ["resources.actors=1", "resources.train_gpus=1"], "resources.train_workers=1 wants 1 GPUs; the cluster has 0: resources.train_gpus=0 would do"),
        ([(4.0, 0.0)], ["resources.gpus_per_actor=1", "resources.train_gpus=0"], "resources.actors=1 wants 1 GPUs; the cluster has 0: resources.gpus_per_actor=0 would do"),
        ([(3.0, 0.0)], ["attach.also={more: {encoder: efficientnet-lite0, image_size: 64}, third: {encoder: efficientnet-lite0, image_size: 32}}", "resources.encoders_apart=true"], "resources.actors=3 (a pool for each of 3 encoders) wants 4 CPUs"),
        ([(3.0, 0.0)], ["resources.actors=2"], ""), ([(2.0, 1.0), (2.0, 1.0)], ["resources.actors=2"], ""), ([(4.0, 0.0)], [], ""),
        ([(4.0, 1.0)], ["resources.train_workers=8", "resources.train_workers_min=1", "train.batch_size=128"], ""),
        ([(1.0, 0.0)], ["resources.actors=8", "resources.gpus_per_actor=1", "resources.autoscaling=true"], ""),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_what_a_run_refuses(nodes: list, overrides: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is proposed is what it then takes."""
    gpus = int(sum(count for _, count in nodes))
    monkeypatch.setattr(cluster, "nodes", lambda: nodes)
    monkeypatch.setattr(cluster, "total_gpus", lambda: gpus)
    there = hardware.Cluster(
        gpus, "H100" if gpus else "", max(1, int(sum(cpus for cpus, _ in nodes)) - 2), "a core", hardware.AT_HAND, nodes=tuple(nodes)
    )

    def refused(config: Config) -> bool:
        try:
            cluster.preflight(config.resources, pools(config))
        except UserError:
            return True
        return False

    found = forecast.collect(load(DEBUG, overrides), forecast.Asked(there))
    assert bool(found["problems"]) == bool(words) == refused(load(DEBUG, overrides))
    assert not words or any(line.startswith(f"does not fit: {words}") for line in printed.lines(found))
    if words and "a larger cluster" not in words:
        mended = load(DEBUG, [*overrides, *(change for problem in found["problems"] for change in problem["would"])])
        assert not refused(mended) and not forecast.collect(mended, forecast.Asked(there))["problems"]


def test_a_local_ray_is_asked_for_what_it_will_have() -> None:
    here = hardware.Cluster(0, "", 2, "a core", hardware.HERE)
    assert here.places(load(DEBUG).resources) == 2 and not forecast.collect(load(DEBUG), forecast.Asked(here))["problems"]
    for overrides, fits in (
        (["resources.actors=3"], True),
        (["resources.actors=4"], False),
        (["resources.actors=3", "resources.num_cpus=3"], False),
        (["resources.num_cpus=9"], True),
    ):
        config = load(DEBUG, overrides)
        assert bool(forecast.collect(config, forecast.Asked(here))["problems"]) != fits, overrides
    assert here.places(config.resources) == 7


def test_what_a_run_refuses_of_batch_and_budget_is_refused(debug_config) -> None:
    with pytest.raises(UserError, match=r"train.batch_size=32 is 2 blocks of 16 images, too few for 4 workers"):
        forecast.collect(load(DEBUG, ["resources.train_workers=4"]), forecast.Asked(hardware.described("8xH100")))
    config = debug_config("select.budget=5")
    pipeline.run(config, "manifest", say=lambda text: None)
    with pytest.raises(UserError, match="5 images of 10 classes, under one a class"):
        forecast.collect(config)


def test_trainings_take_the_gpus_whatever_actors_there_are() -> None:
    two = hardware.Cluster(2, "H100", 16, "a core", hardware.HERE)
    actors = ["resources.actors=8", "resources.gpus_per_actor=0.25"]
    assert [two.trainings(load(DEBUG, more).resources) for more in ([], actors, [*actors, "resources.train_gpus=0"])] == [2, 2, 8]
    assert hardware.Cluster(0, "", 4, "a core", hardware.HERE).trainings(load(DEBUG).resources) == 4


def left(*overrides: str, images: int = 0, name: str = "imagenet256_sit_l_10k") -> dict:
    found = forecast.collect(
        load(ROOT / "configs" / f"{name}.yaml", overrides), forecast.Asked(hardware.described("8xH100"), images=images)
    )
    return {**found["leaves"], "without": found["leaves_without"], "source": found["source_bytes"], "text": "\n".join(printed.lines(found))}


def test_all_that_a_run_leaves_by_hand() -> None:
    inception, levels = 4 * (2048 + 1008), load(ROOT / "configs" / "imagenet256_sit_l_10k.yaml").score.num_timesteps
    found = left("evaluate.network=inception", "evaluate.more_networks=[dinov2-l]", "data.flip=true")
    assert found["manifest"] == pytest.approx(10.6 * 1_281_167) and found["scores"] == pytest.approx((36 + 4 * levels) * 1_281_167)
    # The reference is all images, which hold what was trained on; then what was generated, and the mirror images of the subset.
    assert found["features"] == pytest.approx((inception + 4 * 1024) * (1_281_167 + 50_000 + 10_000))
    assert found["datasets"] == pytest.approx(10_000 * (32_768 + 395_264 + 147_897_477_120 / 1_281_167)) and not found["without"]
    assert left("evaluate.max_reference=50000")["features"] < found["features"] / 5
    by_features = left("select.selector=herding", "embed.encoder=efficientnet-lite0", "evaluate.network=inception")
    assert by_features["scores"] == 0
    assert by_features["features"] == pytest.approx(2 * 1280 * 1_281_167 + inception * (1_281_167 + 60_000))
    kept = left("sample.keep=none", "evaluate.network=inception")
    assert kept["images"] == 0 and kept["features"] == by_features["features"] - 2 * 1280 * 1_281_167
    unknown = left(images=1_000_000)
    assert unknown["datasets"] == 10_000 * (32_768 + 395_264) and unknown["source"]["bytes"] is None
    assert ", without the datasets' images, whose size is not known" in unknown["text"] and "whose size" not in found["text"]


def test_an_assumed_imagenet_is_said_and_is_as_large_as_its_limit() -> None:
    found = left(name="cifar10")
    assert "assumed: ImageNet's 1,281,167 images of 1,000 classes, 147.9 GB (d2c manifest counts" in found["text"]
    assert found["source"]["source"] == "assumed"
    for budget in ("500", "0.01"):
        config = imagenet("data.limit_per_class=12", f"select.budget={budget}")
        data, assumed = estimate.known(0, config, None, None)
        assert data.images == 12_000 and assumed[0].startswith("ImageNet's 12,000 images of 1,000 classes, 1.4 GB")
    with pytest.raises(UserError, match="asks for 10000 images; there are 5000"):
        forecast.collect(imagenet("data.limit_per_class=5"))


def test_a_plan_of_a_sweep_says_that_it_is_of_one_trial() -> None:
    sweep = load(
        ROOT / "configs" / "sweep_digits.yaml",
        ["sweep.axes={select.budget: [20, 40], train.align_weight: [0, 0.5]}", "sweep.seeds=[0, 1, 2]"],
    )
    assert printed.lines(forecast.collect(sweep))[0] == "one trial of 12; d2c sweep --dry-run plans all"
    assert printed.lines(forecast.collect(load(DEBUG)))[0] == "student"


def test_what_is_there_is_summed_where_it_was_planned(debug_config) -> None:
    """The manifest never is: its 10 s must not stand against nothing."""
    config = debug_config()
    plan = plans.make(config)
    for stage, seconds in (("manifest", 10.0), ("teacher", 7.0), ("score", 20.0)):
        (node,) = plan.of(stage)
        write_json(
            node.folder / "_SUCCESS.json",
            {"seconds": seconds, "places": 1, "facts": {"rows": 120, "class_names": ["x"] * 10, "class_counts": [12] * 10}},
        )
    monkeypatched = {plan.of("score")[0].name: {"seconds": 15.0, "places": 1}, plan.of("train")[0].name: {"seconds": 9.0, "places": 1}}
    write_json(plan.folder / "plan.json", {"planned": {}})
    nothing = "\n".join(printed.lines({**collect_without_parts(config)}))
    assert "what is there" not in nothing
    write_json(plan.folder / "plan.json", {"planned": monkeypatched})
    found = collect_without_parts(config)
    assert (found["total"]["planned_seconds"], found["total"]["actual_seconds"]) == (15.0, 20.0)
    assert "what is there and was planned: planned 15.0 s, took 20.0 s, over 1 stage" in "\n".join(printed.lines(found))


def collect_without_parts(config: Config) -> dict:
    """Of a run whose finished stages have no tables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecast, "_manifest", lambda plan: (forecast._facts(plan), None))
        return forecast.collect(config)


def test_a_reference_that_the_driver_cannot_list_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "host_memory", lambda: 24e9)

    def found(images: int, *overrides: str) -> list[dict]:
        problems = forecast.collect(
            load(DEBUG, ["data.source=folder", "data.limit_per_class=0", *overrides]), forecast.Asked(images=images)
        )["problems"]
        return [problem for problem in problems if "measured against" in problem["what"]]

    assert not found(100_000_000)
    (large,) = found(400_000_000)
    assert large["wants"] == 124 * 400_000_000 and large["would"] == ["evaluate.max_reference=50000"]
    assert not found(400_000_000, *large["would"])
    (huge,) = found(10_000_000_000)
    assert not huge["would"] and huge["else_would"] == "a machine of 1,378 GB"


def test_messages_say_what_is_planned_with_and_what_was_not_looked_at() -> None:
    _, text = fits("resources.micro_batch=0")
    (line,) = [line for line in text if line.startswith("does not fit: the memory of a training step")]
    assert " of the 21.6 GB that are planned with (90% of one L4): resources.micro_batch=" in line
    assert (
        text[0].startswith("it does not fit as it stands: ") and text[0].endswith("; what would do is said below") and text[2] == "student"
    )
    assert "the memory of a training step" in text[0]
    unseen = "not checked: the run folder's disk and the disk of a node's copies (--disk GB and --cache GB say what is free there)"
    assert unseen in text and unseen not in fits(disk=1e12, cache=1e12)[1]
    assert "not checked: the disk of a node's copies (--cache GB says what is free there)" in fits(disk=1e12)[1]
    assert not any(line.startswith("not checked") for line in printed.lines(forecast.collect(load(DEBUG))))


def test_weights_of_all_that_a_process_holds_are_counted() -> None:
    """Parameters as the libraries count them, to a thousandth: T5 v1.1's encoders, DINOv2, Stable Diffusion's VAE."""
    counts = {"small": 35_332_800, "base": 109_628_544, "large": 341_231_104, "xl": 1_223_527_424, "xxl": 4_762_310_656}
    assert {size: estimate.text_parameters(f"google/flan-t5-{size}") for size in counts} == {
        size: pytest.approx(count, rel=1e-3) for size, count in counts.items()
    }
    counts = {"s": 22_056_576, "b": 86_580_480, "l": 304_368_640, "g": 1_136_480_768}
    assert {size: estimate.vision_parameters(f"dinov2-{size}") for size in counts} == {
        size: pytest.approx(count, rel=4e-3) for size, count in counts.items()
    }
    vae = 4 * 83_653_863
    config = imagenet(
        "attach.text.encoder=google/t5-v1_1-xxl",
        "attach.vision.encoder=dinov2-g",
        "attach.also={more: {encoder: dinov2-l}}",
        "train.align_with=more",
    )
    found = estimate.forwards(config, 1000, [])
    assert found["text"]["bytes"] == pytest.approx(4 * 4_762_310_656, rel=1e-3)
    giant, large = (4 * estimate.vision_parameters(f"dinov2-{size}") for size in "gl")
    encoding = estimate.vae_bytes(config, False)
    assert found["attach"] == {"bytes": giant + large + vae + encoding, "knob": "vae.device_batch", "value": config.vae.device_batch}
    apart = imagenet(
        "attach.vision.encoder=dinov2-g",
        "attach.also={more: {encoder: dinov2-l}}",
        "train.align_with=more",
        "resources.encoders_apart=true",
    )
    assert estimate.forwards(apart, 1000, [])["attach"]["bytes"] == giant + encoding
    student = estimate.transformer_spec(config, 1000, [])
    assert found["decode"]["bytes"] == 4 * estimate.parameters(student) + vae + estimate.vae_bytes(config, True)
    teacher = estimate.teacher_spec(config, 1000, [])
    bf16 = config.score.precision == "bf16"
    own = estimate.forward_bytes(teacher, config.score.device_batch, bf16)
    assert found["score"]["bytes"] == estimate.forward_weights(teacher, bf16) + vae + max(own, encoding)
    online = estimate.student(imagenet("attach.vision.encode=training", "vae.encode=training"), IMAGENET)["memory"]
    stored = estimate.student(imagenet(), IMAGENET)["memory"]
    assert (
        online["total"] - stored["total"] == vae + 4 * estimate.vision_parameters("dinov2-b") == online["encoders"]
        and stored["encoders"] == 0
    )


def test_encoders_that_do_not_fit_together_go_apart_or_take_less() -> None:
    over = ["attach.text.encoder=google/t5-v1_1-xxl", "attach.vision.encoder=dinov2-g", "vae.device_batch=1", "train.align_with=more"]
    over.append("attach.also={more: {encoder: dinov2-l}, " + ", ".join(f"g{number}: {{encoder: dinov2-g}}" for number in range(3)) + "}")

    def problems(*more: str) -> dict[str, dict]:
        found = forecast.collect(imagenet(*over, *more), forecast.Asked(hardware.described("8xT4"), disk=1e15, cache=1e15))["problems"]
        return {problem["what"]: problem for problem in found if "encoding" in problem["what"]}

    found = problems("train.precision=fp32", "resources.train_workers=8")
    assert {what: problem["would"] for what, problem in found.items()} == {
        "the memory of encoding images": ["resources.encoders_apart=true"], "the memory of encoding class names": ["attach.text.precision=bf16"],
    }  # fmt: skip
    assert not problems(
        "train.precision=fp32", "resources.train_workers=8", *(change for problem in found.values() for change in problem["would"])
    )


def test_an_elastic_training_is_as_large_as_with_the_fewest_workers() -> None:
    elastic = ["resources.train_workers=8", "resources.train_workers_min=1", "train.batch_size=256"]
    one = estimate.student(imagenet("train.batch_size=256"), IMAGENET)["memory"]
    assert estimate.student(imagenet(*elastic), IMAGENET)["memory"] == one and one["micro_batch"] == 256
    found = forecast.collect(imagenet(*elastic), forecast.Asked(hardware.described("8xA100")))
    (problem,) = [problem for problem in found["problems"] if problem["what"] == "the memory of a training step"]
    assert problem["would"][0].startswith("resources.micro_batch=")
    mended = forecast.collect(imagenet(*elastic, *problem["would"]), forecast.Asked(hardware.described("8xA100")))
    assert not mended["problems"]


def test_the_report_sums_what_was_planned_beside_what_that_took() -> None:
    """The manifest is never planned, a random choice needs no score, and an older run planned nothing."""
    seconds: dict[str, float | None] = {"manifest": 3.0, "score": None, "select": 2.0, "train": 50.0}
    arm = gather.Arm("D2C", {}, {}, [], pa.table({}), "random", seconds, {"score": 9.0, "select": 1.0, "train": 40.0})
    assert arm.planned_beside_actual == (41.0, 52.0) and arm.total_seconds == 55.0
    arm.planned = {}
    assert arm.planned_beside_actual is None
