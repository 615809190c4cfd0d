"""`d2c bench`: a real one, what plan and a sweep's dry run make of it, and files that are none."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import DEBUG, ROOT

from d2c_ray import bench, cli, estimate, forecast, hardware, pipeline, rates, sweep
from d2c_ray import plan as plans
from d2c_ray.config import Config, load
from d2c_ray.distributed import cluster
from d2c_ray.errors import UserError
from d2c_ray.report import estimate as printed
from d2c_ray.report import sweep as outcome

DIGITS = estimate.Data(120, 10)
CPU = hardware.Cluster(0, "", 2, "a core", hardware.HERE)


@pytest.fixture(scope="module")
def benched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path, str]:
    """A configuration whose run.dir has a bench.json of this machine, through the command line; and what that printed."""
    import contextlib
    import io

    folder, out = tmp_path_factory.mktemp("runs"), io.StringIO()
    overrides = [f"run.dir={folder}", "resources.actors=1"]
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
        cli.main(["bench", str(DEBUG), *overrides])
    assert not ended.value.code
    return load(DEBUG, overrides), folder / rates.FILE, out.getvalue()


def test_it_measures_all_that_a_run_is_made_of(benched: tuple[Config, Path, str]) -> None:
    _, file, out = benched
    entries = json.loads(file.read_text())["entries"]
    assert sorted(entry["what"] for entry in entries) == sorted(
        ["start", "read", "train", "train", "forward", "vision", "sample", "network", "comparing"]
    )
    for entry in entries:
        assert entry["seconds"] > 0 and entry["raw"] and entry["versions"]["torch"] and entry["date"] and entry["threads"] == 1
        assert (entry["device"], entry["gpu"], entry["host_gpu"]) == (hardware.cpu_name(), False, ""), "no GPU here"
    assert "images trained on: " in out and str(file) in out
    assert {path.name for path in file.parent.iterdir()} == {rates.FILE}, "nothing else is made"


@pytest.mark.parametrize("option", ["--out={}/bench.json", "run.dir={}"])
def test_where_nothing_can_be_written_nothing_is_measured(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a file").write_text("")
    for place in (tmp_path / "a file" / "below", *([Path("/proc/nope")] if Path("/proc/self").exists() else [])):
        with pytest.raises(SystemExit) as ended:
            cli.main(["bench", str(DEBUG), option.format(place)])
        out, err = capsys.readouterr()
        assert (ended.value.code, out) == (2, "") and any(words in err for words in ("nothing can be written to", "is no folder")), err


def test_plan_counts_with_what_was_measured_and_says_so(benched: tuple[Config, Path, str]) -> None:
    config, file, _ = benched
    found = forecast.collect(config)
    entry = {entry["shape"]: entry for entry in rates.from_file(file) if entry["what"] == "train"}
    (train,) = [row for row in found["stages"] if row["stage"] == "train"]
    (part,) = [part for part in train["parts"] if part["what"] == "train"]
    (mine,) = [own for shape, own in entry.items() if "text" in shape]
    assert part["seconds"] == pytest.approx(512 * mine["seconds"]) and part["source"] == rates.MEASURED
    parts = [
        part for row in found["stages"] for part in row["parts"] if part["what"] not in ("listing", "choosing", "waiting for the driver")
    ]
    assert {part["source"] for part in parts if part["what"] != "starting"} == {rates.MEASURED}
    assert {(part["source"], "fitted to runs of the presets" in part["said"]) for part in parts if part["what"] == "starting"} == {
        ("assumed", True)
    }
    assert f"measured here: {hardware.cpu_name()}" in "\n".join(printed.lines(found))
    for other in (forecast.Asked(hardware.described("H100")), forecast.Asked(replace(hardware.here(), cpu="another CPU"))):
        rows = forecast.collect(config, other)["stages"]
        assert not any(part["source"] == rates.MEASURED for row in rows for part in row["parts"]), "of this machine, and not of others"
    threads = forecast.collect(load(DEBUG, [f"run.dir={config.run.dir}", "resources.threads=2"]))
    assert {part["source"] for row in threads["stages"] for part in row["parts"] if part["what"] == "train"} == {rates.PUBLISHED}


def test_another_shape_is_counted_by_flops(benched: tuple[Config, Path, str]) -> None:
    config, _, _ = benched
    deeper = replace(config, model=replace(config.model, depth=4))
    known, here = rates.of(config), hardware.here()
    (_, shallow), (_, deep) = (known.image("train", own, DIGITS, here.device("train", own.resources))[0] for own in (config, deeper))
    flops = [estimate.pieces("train", own, DIGITS, [])[0].flops for own in (config, deeper)]
    assert deep.seconds == pytest.approx(shallow.seconds * flops[1] / flops[0]) and deep.source == rates.MEASURED
    assert "of another shape" in deep.said and "of another shape" not in shallow.said


def test_a_sweep_and_a_plan_agree(benched: tuple[Config, Path, str]) -> None:
    """A sweep of one trial takes what its run would, stage after stage."""
    config, _, _ = benched
    one = replace(config, sweep=replace(config.sweep, axes={"select.budget": [40]}, seeds=[0], random_twins=False))
    dry = sweep.forecast(one)
    found = forecast.collect(config)
    rows = {row["stage"]: row for row in found["stages"]}
    assert rows["manifest"]["done"], "which the dry run has listed"
    todo = {stage: row["seconds"] for stage, row in rows.items() if stage != "manifest"}
    own = sum(todo[stage] for stage in ("train", "sample", "evaluate"))
    assert dry["trial_seconds"] == pytest.approx(own)
    begun = rates.of(config).start(hardware.here()).seconds * rates.STARTS["attach"]  # attaching to all, and taking from it
    assert dry["shared_seconds"] == pytest.approx(sum(todo.values()) - own + begun)


def test_a_measurement_replaces_its_older_self_and_leaves_others(benched: tuple[Config, Path, str], tmp_path: Path) -> None:
    _, file, _ = benched
    entries = rates.from_file(file)
    older = [{**entry, "seconds": 99.0} for entry in entries[:2]] + [{**entries[0], "device": "elsewhere", "seconds": 7.0}]
    assert len({bench._name(entry) for entry in [*entries, *older]}) == len(entries) + 1
    assert bench.merged(older, entries)[0]["seconds"] == 7.0 and len(bench.merged(older, entries)) == len(entries) + 1


def test_decoding_is_timed_on_the_images_that_are_at_hand(benched: tuple[Config, Path, str]) -> None:
    config, _, _ = benched
    rows = forecast.some_rows(config)  # the sweep above has listed them, or nothing has
    if rows is None:
        from d2c_ray import pipeline

        pipeline.run(config, "manifest", say=lambda text: None)
        rows = forecast.some_rows(config)
    real, made_up = (bench._reading(config, given, bench.QUICK) for given in (rows, None))
    assert "made_up" not in real and made_up["made_up"] and real["images"] == 64
    assert real["seconds"] < made_up["seconds"], "an 8 x 8 PNG is less than a photograph"


@pytest.mark.parametrize("content", ["", "[]", '{"entries": [{"what": "train"}]}', '{"entries": 3}'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / rates.FILE).write_text(content)
    with pytest.raises(UserError, match=r"bench.json' is no file of d2c bench"):
        rates.of(load(DEBUG, [f"run.dir={tmp_path}"]))


ENTRY = {"what": "comparing", "shape": "x", "device": "a core", "gpu": False, "seconds": 0.5, "date": "2026-11-28", "flops": 10.0, "precision": "fp32", "host_gpu": "", "threads": 1, "made": 20, "real": 40}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("date", None), ("flops", "1e12"), ("flops", -1), ("seconds", "0.5"), ("seconds", float("nan")), ("seconds", float("inf")), ("seconds", -1), ("seconds", 0),
        ("seconds", True), ("seconds", 10**40), ("threads", 0.5), ("made", ...), ("real", 0), ("gpu", 1), ("host_gpu", None), ("shape", ...),
    ],
)  # fmt: skip
def test_an_entry_that_is_none_is_named(tmp_path: Path, name: str, value: object) -> None:
    wrong = {key: value if key == name else own for key, own in ENTRY.items() if key != name or value is not ...}
    (tmp_path / rates.FILE).write_text(json.dumps({"entries": [ENTRY, wrong]}))
    with pytest.raises(UserError, match=rf"bench.json' is no file of d2c bench \(entry 1: {name} is "):
        rates.of(load(DEBUG, [f"run.dir={tmp_path}"]))
    (tmp_path / rates.FILE).write_text(json.dumps({"entries": [ENTRY, {**ENTRY, "flops": None}]}))
    assert len(rates.of(load(DEBUG, [f"run.dir={tmp_path}"])).entries) == 2


def test_a_run_goes_on_beside_a_broken_file(debug_config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ray and its GPUs are taken when a run is planned: whatever is wrong there costs the plan and nothing else."""
    monkeypatch.setattr(cluster, "at_hand", lambda local: CPU)
    config = debug_config()
    plan = plans.make(config)
    status, nodes = pipeline.Status(plan), [node for node in plan.nodes if node.stage != "manifest"]
    file = Path(config.run.dir) / rates.FILE
    file.write_text(json.dumps({"entries": [{**ENTRY, "seconds": "0.5"}]}))
    status.plan(nodes, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"d2c: nothing is planned for this run: '{file}' is no file of d2c bench (entry 0: seconds is '0.5'")
    assert json.loads((plan.folder / "plan.json").read_text())["planned"] == {}
    file.unlink()
    monkeypatch.setattr(rates.Rates, "stage", lambda *given: 1 / 0)
    status.plan(nodes, 2)
    assert capsys.readouterr().err == "d2c: nothing is planned for this run: ZeroDivisionError: division by zero\n"
    monkeypatch.undo()
    monkeypatch.setattr(cluster, "at_hand", lambda local: CPU)
    status.plan(nodes, 2)
    assert set(json.loads((plan.folder / "plan.json").read_text())["planned"]) == {node.name for node in nodes}


def test_a_gpu_is_known_by_its_long_name_and_by_its_short_one() -> None:
    entry = {"what": "train", "shape": "x", "device": "NVIDIA H100 80GB HBM3", "gpu": True, "seconds": 0.5, "date": "2026-11-28", "flops": 10.0, "precision": "bf16", "host_gpu": "NVIDIA H100 80GB HBM3", "threads": 1}  # fmt: skip
    piece = estimate.Piece("train", "x", 1, 10.0, "bf16")
    found = rates.Rates([entry])
    assert found.piece(piece, hardware.Device("H100", True)).seconds == 0.5
    assert found.piece(piece, hardware.Device("H100 PCIe", True)).source == rates.ASSUMED, "another device"
    assert found.piece(replace(piece, shape="y", flops=30.0), hardware.Device("H100", True)).seconds == pytest.approx(1.5)
    assert found.piece(replace(piece, precision="fp32", shape="y"), hardware.Device("H100", True)).source == rates.ASSUMED
    rate = rates.Rates([]).piece(replace(piece, precision="fp32", flops=8.693e10), hardware.Device("any", False, 2))
    assert (rate.source, rate.seconds) == (rates.PUBLISHED, pytest.approx(0.5, rel=1e-3)), "0.087 TFLOP/s a core, two threads"


def test_actors_that_share_a_gpu_share_its_pace() -> None:
    half = load(DEBUG, ["resources.gpus_per_actor=0.5"])
    cluster, known = hardware.described("2xH100"), rates.Rates([])
    assert cluster.places(half.resources) == 4 and cluster.places(load(DEBUG).resources) == 2
    each = [known.stage("score", own, DIGITS, cluster, share).parts[1][1] for own, share in ((half, 4), (load(DEBUG), 2))]
    assert each[0] == pytest.approx(each[1]) and each[0] > 0


def test_a_gpu_at_hand_that_nothing_is_known_of_leaves_hours_open() -> None:
    found = forecast.collect(load(DEBUG), forecast.Asked(hardware.Cluster(1, "Abacus 9", 8, "", hardware.AT_HAND)))
    assert found["total"]["seconds"] is None and "train" in found["total"]["not_known"]
    assert "in all: not known, for want of teacher, score" in "\n".join(printed.lines(found))


def test_what_is_not_at_hand_is_left_out_and_said(benched: tuple[Config, Path, str]) -> None:
    """A vision encoder that nobody has: its tokens are not measured, and what else is new is."""
    overrides = ["attach.vision.encoder=nobody/dinov2-base", "attach.text.encoder=none", "train.align_weight=0", "score.device_batch=32"]
    config = load(DEBUG, [f"run.dir={benched[0].run.dir}", *overrides])
    found, missing = bench.measured([("attach", config), ("score", config)], DIGITS, 1, known=rates.of(config))
    assert {entry["what"] for entry in found} == {"start", "forward"}
    ((what, why),) = missing.items()
    assert what.startswith("vision of nobody/dinov2-base") and "nobody/dinov2-base" in why


def test_a_model_too_large_for_a_bench_is_told_from_smaller_steps(
    benched: tuple[Config, Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two small steps: what the optimizer takes is shared by the images of a whole one. Sampling it is left out."""
    config = load(DEBUG, [f"run.dir={benched[0].run.dir}", "model.width=384", "model.heads=6", "train.batch_size=512"])
    (train,), (sample,) = (estimate.pieces(stage, config, DIGITS, []) for stage in ("train", "sample"))
    small = replace(bench.QUICK, cpu_flops=2 * train.flops)
    found = bench._training(config, train, DIGITS, torch.device("cpu"), small)
    assert found["from_steps_of"] == [2, 4]
    assert 0 < found["seconds"] <= min(found["raw"][1]) / 2
    with monkeypatch.context() as patch:
        patch.setattr(bench, "_steps", lambda *given: ({2: [0.9, 0.3, 0.5], 4: [0.7, 0.34, 0.4]}[given[4]], 2))
        known = bench._training(config, train, DIGITS, torch.device("cpu"), small)
    assert known["seconds"] == pytest.approx(0.02 + 0.26 / 512), "two images take 0.04 s of 0.3 s, and the optimizer the rest"
    with pytest.raises(UserError, match="counts it by the FLOPs of scoring"):
        bench._sampling(config, sample, DIGITS, torch.device("cpu"), replace(small, cpu_flops=1.0))
    forward = [entry for entry in rates.of(config).entries if entry["what"] == "forward"]
    rate = rates.Rates(forward).piece(sample, hardware.Device(hardware.cpu_name(), False))
    assert rate.source == rates.MEASURED and "of another shape" in rate.said


def fast_dit(*overrides: str) -> Config:
    """A DiT-XL/2 of 256 px on latents, as fast-DiT trains it."""
    of = [
        "attach.text.encoder=none",
        "attach.vision.encoder=none",
        "train.align_weight=0",
        "resources.recompute=true",
        "train.batch_size=128",
    ]
    return load(ROOT / "configs" / "imagenet256_dit_xl_10k.yaml", [*of, *overrides])


def test_the_published_pace_of_training_is_the_published_one() -> None:
    """0.84 steps of 128 images a second, recomputing: so four forwards; scoring has no published pace."""
    imagenet, known, cluster = estimate.Data(1_281_167, 1000), rates.Rates([]), hardware.described("A100")
    ((_, rate),) = known.image("train", fast_dit(), imagenet, cluster.device("train", fast_dit().resources))
    assert 1 / rate.seconds / 128 == pytest.approx(0.84, rel=3e-3) and rate.source == rates.PUBLISHED
    plain = fast_dit("resources.recompute=false")
    ((_, less),) = known.image("train", plain, imagenet, cluster.device("train", plain.resources))
    assert less.seconds == pytest.approx(rate.seconds * 3 / 4)
    for stage in ("score", "sample"):
        own = fast_dit("score.precision=bf16", "sample.precision=bf16", "vae.precision=bf16")
        assert {rate.source for _, rate in known.image(stage, own, imagenet, cluster.device(stage, own.resources))} == {rates.ASSUMED}


def test_threads_beyond_the_cores_compute_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def training(threads: int, share: int, precision: str = "fp32") -> float:
        config = load(DEBUG, [f"resources.threads={threads}", f"train.precision={precision}"])
        (found,) = [part[1] for part in rates.Rates([]).stage("train", config, DIGITS, CPU, share).parts if part[0] == "train"]
        return found * share  # of all workers

    assert training(2, 1) == pytest.approx(training(1, 1) / 2)
    assert training(64, 1) == training(2, 1) and training(64, 2) == training(1, 2) == training(1, 1)
    monkeypatch.setattr(rates, "native_bf16", lambda: True)
    fast = training(1, 1, "bf16")
    monkeypatch.setattr(rates, "native_bf16", lambda: False)
    assert fast < training(1, 1) < training(1, 1, "bf16"), "emulated"


@pytest.mark.parametrize("selector", ["gadc", "herding"])
def test_classes_are_selected_side_by_side(selector: str) -> None:
    config, known, data = load(DEBUG, [f"select.selector={selector}"]), rates.Rates([]), estimate.Data(1000, 10)

    def choosing(share: int, cluster: hardware.Cluster = CPU, own: Config = config) -> tuple[float | None, str]:
        found = known.stage("select", own, data, cluster, share)
        return found.seconds and next(seconds for what, seconds, _ in found.parts if what == "choosing"), found.parts[-1][2].source

    (alone, source), (four, _), (many, _) = choosing(1), choosing(4), choosing(64)
    assert alone and four and many and source == rates.PUBLISHED
    assert four == pytest.approx(alone * 3 / 10) and many == pytest.approx(alone / 10), (
        "ten classes: three turns of four, and no more than ten"
    )
    on_gpu = load(DEBUG, [f"select.selector={selector}", "resources.gpus_per_actor=1"])
    assert choosing(1, hardware.described("4xH100"), on_gpu)[1] == (rates.ASSUMED if selector == "gadc" else rates.PUBLISHED)
    assert (choosing(1, CPU, on_gpu)[0] is None) == (selector == "gadc")


def test_one_driver_and_the_tables_of_many_images() -> None:
    many, known = estimate.Data(100_000_000, 1000), rates.Rates([], 1.0)

    def parts(stage: str, cluster: hardware.Cluster, *overrides: str, data: estimate.Data = many) -> dict[str, float]:
        own = load(DEBUG, ["data.limit_per_class=0", *overrides])
        return {what: seconds for what, seconds, _ in known.stage(stage, own, data, cluster, cluster.places(own.resources)).parts}

    scored = parts("score", hardware.described("512xH200", 8192))
    assert sum(scored.values()) - scored["starting"] == pytest.approx(100_000_000 / 22_985), "a debug model is no work for 512 GPUs"
    assert parts("score", hardware.described("", 2))["waiting for the driver"] == 0
    assert parts("select", hardware.described("", 2))["choosing"] == pytest.approx(72), "ten partitions on two cores, 90 s with Ray's start"
    assert parts("select", hardware.described("", 8))["choosing"] == pytest.approx(18)
    assert parts("select", hardware.described("", 8), data=estimate.Data(1_280_000, 1000))["choosing"] == pytest.approx(0.65)
    listing = {
        path: known.stage("manifest", load(DEBUG, ["data.source=auto", f"data.path={path}"]), many, CPU, 1).parts[-1] for path in ("s3://b/a.parquet", "/a/b.parquet", "/a/tars")
    }  # fmt: skip
    assert [(seconds, rate.source) for _, seconds, rate in listing.values()] == [
        (5000, "assumed"),
        (pytest.approx(124), "published"),
        (5000, "assumed"),
    ]


def test_scoring_draws_noise_while_it_decodes() -> None:
    config, known = fast_dit("score.num_timesteps=16"), rates.Rates([])
    data, cluster = estimate.Data(1000, 1000), hardware.Cluster(0, "", 1, "a core", hardware.HERE)
    each = {
        stage: {what: seconds for what, seconds, _ in known.stage(stage, config, data, cluster, 1).parts}["decoding"]
        for stage in ("score", "reference")
    }
    assert each == {"score": pytest.approx(3.5 + 0.9), "reference": pytest.approx(3.5)}


def test_measures_take_as_long_as_their_features_are_wide() -> None:
    def comparing(network: str) -> float:
        found = rates.Rates([]).stage("evaluate", load(DEBUG, [f"evaluate.network={network}"]), estimate.Data(10_000, 10), CPU, 1)
        return next(seconds for what, seconds, _ in found.parts if what == "comparing")

    assert comparing("inception") > comparing("dinov2-g") > comparing("efficientnet-lite2") > comparing("dinov2-l") > comparing("dinov2-s")


def test_what_cores_do_is_never_taken_of_another_cpu() -> None:
    """Of a cluster whose cores are not known, it is taken of a machine with its GPU."""
    entry = {**ENTRY, "what": "start", "shape": "", "host_gpu": "NVIDIA H100 80GB HBM3"}
    known = rates.Rates([entry])
    assert known.start(hardware.described("H100")).source == rates.MEASURED
    assert known.start(hardware.Cluster(1, "NVIDIA H100 80GB HBM3", 8, "a core", hardware.HERE)).source == rates.MEASURED
    assert known.start(hardware.Cluster(1, "NVIDIA H100 80GB HBM3", 8, "another core", hardware.HERE)).source == rates.PUBLISHED


def test_a_dry_run_counts_with_the_trials_that_a_sweep_runs_at_once(debug_config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "here", lambda: hardware.Cluster(2, "H100", 16, "a core", hardware.HERE))
    monkeypatch.setattr(bench, "measured", lambda *given, **named: ([], {}))
    config = debug_config(
        "resources.actors=8", "resources.gpus_per_actor=0.25", "sweep.axes={select.budget: [20, 30, 40, 50]}", "sweep.random_twins=false"
    )
    assert sweep.forecast(config)["concurrent"] == 2
    monkeypatch.setattr(hardware, "here", lambda: hardware.Cluster(0, "", 2, "a core", hardware.HERE))
    assert any(
        said.startswith("that score takes no time, which is not known: it wants a GPU") for said in sweep.forecast(config)["assumed"]
    )


def test_what_another_bench_measured_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, mine, theirs = tmp_path / rates.FILE, {**ENTRY, "shape": "mine"}, {**ENTRY, "shape": "theirs"}

    def measured(*given: object, **named: object) -> tuple[list[dict], dict[str, str]]:
        file.write_text(json.dumps({"entries": [theirs]}))
        return [mine], {}

    monkeypatch.setattr(bench, "measured", measured)
    bench.run(load(DEBUG), file, say=lambda text: None)
    assert rates.from_file(file) == [theirs, mine]


def test_a_gpu_that_ray_names_is_taken_for_what_was_benched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray calls an H100 PCIe an H100; on a machine of one's own the driver says it whole."""
    pcie = {**ENTRY, "what": "train", "gpu": True, "device": "NVIDIA H100 PCIe", "host_gpu": "NVIDIA H100 PCIe", "precision": "bf16"}
    piece, known = estimate.Piece("train", "x", 1, 10.0, "bf16"), rates.Rates([pcie])
    assert known.piece(piece, hardware.Device("H100", True)).source == rates.ASSUMED, "as described: it may be the other kind"
    monkeypatch.setattr(cluster, "nodes", lambda: [(16.0, 1.0)])
    monkeypatch.setattr(cluster, "total_gpus", lambda: 1)
    monkeypatch.setattr(cluster, "gpu_name", lambda: "H100")
    resources = load(DEBUG).resources
    found = cluster.at_hand()
    rate = known.piece(piece, found.device("train", resources))
    assert (rate.seconds, rate.said) == (0.5, "NVIDIA H100 PCIe, 2026-11-28, which the cluster's H100 is taken to be")
    assert found.assumed[0].startswith("that H100, as Ray names the GPUs")
    assert known.piece(piece, replace(found, gpu="A100").device("train", resources)).source != rates.MEASURED
    monkeypatch.setattr(cluster, "gpu_models", lambda: ["NVIDIA H100 PCIe"])
    own = cluster.at_hand(local=True)
    assert (own.gpu, own.assumed) == ("NVIDIA H100 PCIe", ())
    assert known.piece(piece, own.device("train", resources)).said == "NVIDIA H100 PCIe, 2026-11-28"
    assert cluster.at_hand().gpu == "H100"


def test_names_of_gpus_are_known_in_small_letters_and_all_are_named() -> None:
    assert hardware.kind("h100 pcie") == "H100 PCIe" and hardware.kind("rtx-4090") == "RTX 4090" and hardware.kind("rtx 4090 d") is None
    assert hardware.memory_bytes("a100-80gb") == 80e9 and hardware.memory_bytes("l4") == 24e9
    assert hardware.memory_bytes("NVIDIA GH200 480GB") == 96e9, "the name says the CPU's"
    rates.check(hardware.described("8xh100"), load(DEBUG), rates.Rates([]))
    with pytest.raises(
        UserError,
        match=r"one of H200 NVL, H200, GH200, H100 NVL, H100 PCIe, H100, A100, L40S, L4, A10G, A10, RTX 4090, V100 SXM2, V100 PCIE, T4 would do",
    ):
        rates.check(hardware.described("Abacus"), load(DEBUG), rates.Rates([]))


def test_a_dry_run_is_of_a_cluster_too(debug_config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where nothing is measured, since it is another machine."""
    monkeypatch.setattr(bench, "measured", lambda *given, **named: 1 / 0)
    config = debug_config("sweep.axes={select.budget: [20, 40]}", "sweep.random_twins=false")
    two, one = (sweep.forecast(config, hardware.described(gpus)) for gpus in ("2xH100", "H100"))
    assert (two["concurrent"], one["concurrent"]) == (2, 1) and two["seconds"] < one["seconds"]
    said = "\n".join(outcome.forecast_lines(two))
    assert (
        "hours: " in said
        and ", on 2 x H100 and 16 CPU cores (described), by what d2c plan goes by" in said
        and " MB (" in said
        and "GiB" not in said
    )
    with pytest.raises(UserError, match="--gpus Abacus: no peak"):
        sweep.forecast(config, hardware.described("Abacus"))
    overrides = [f"run.dir={config.run.dir}", "sweep.axes={select.budget: [20, 40]}"]
    with pytest.raises(SystemExit):
        cli.main(["sweep", str(DEBUG), *overrides, "--gpus", "H100"])
    assert "--gpus is of a dry run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["sweep", str(DEBUG), *overrides, "--dry-run", "--gpus", "H100"])
    assert "on 1 x H100" in capsys.readouterr().out


def test_memory_is_said_in_the_units_of_a_plan() -> None:
    (line,) = bench.lines([{**ENTRY, "what": "train", "shape": "x", "peak_bytes": 21.6e9}])
    assert line == "images trained on: 2 a second, 21.6 GB (x)"
