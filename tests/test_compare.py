"""Runs side by side: what may be compared, what is refused, and what is said of images and seconds."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import DEBUG

from d2c_ray import cli
from d2c_ray import plan as plans
from d2c_ray.config import arm_configs, load, to_yaml
from d2c_ray.errors import UserError
from d2c_ray.evaluate import record as records
from d2c_ray.evaluate.measures import measure
from d2c_ray.report import compare, html, numbers
from d2c_ray.rundir import StageDir, write_json, write_text

RECORD = {
    "sampler": "euler", "steps": 25, "guidance": 1.5, "guidance_interval": None, "guidance_channels": None, "weights": "ema", "ema_decay": 0.9,
    "vae_decoder": None, "class_draw": "balanced", "sample_seed": 0, "sample_precision": "fp32", "train_images": 512, "network": "efficientnet-lite2",
    "network_weights": "0123", "network_image_size": 64, "image_size": 8, "generated": 80, "reference": 90, "reference_images": "4567",
    "reference_statistics": None, "neighbours": 3, "kid_subsets": 4, "kid_subset_size": 1000, "bootstrap": 0, "evaluate_seed": 0, "seeds": 1,
}  # fmt: skip


def metrics(seed: int, record: dict[str, Any]) -> dict[str, Any]:
    """Measures of features drawn about real ones, as a stage would write them."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(0)
    real, held_out = fixed.normal(size=(90, 4)), fixed.normal(size=(80, 4))
    found = measure(
        reference=real, reference_labels=np.zeros(90, int), held_out=held_out, held_out_labels=np.zeros(80, int), generated=rng.normal(size=(80, 4)) * 1.2,
        asked=np.zeros(80, int), subset=fixed.normal(size=(30, 4)), neighbours=3, kid_subsets=4, pairs=2, probe=False,
    )  # fmt: skip
    return {**found, "record": {**RECORD, **record}, "more": {}, "unguided": None, "notices": []}


def finished(root: Path, name: str, *overrides: str, seed: int = 0, seconds: float = 10.0, device: str = "x86_64", **record: Any) -> Path:
    """The folder of a run as it lies there when it is finished, without its images."""
    config = load(DEBUG, [f"run.dir={root}", f"run.name={name}", *overrides])
    folder, arms = root / name, {}
    for number, (arm, own) in enumerate(arm_configs(config).items()):
        places = {
            stage: f"{plans.FOLDERS.get(stage, stage)}-{name}{number}"
            for stage in ("manifest", "teacher", "score", "select", "attach", "train", "sample", "evaluate")
        }
        reads = {
            "manifest": [], "teacher": ["manifest"], "score": ["manifest", "teacher"], "select": ["manifest", "score"], "attach": ["manifest", "select", "score"],
            "train": ["manifest", "attach"], "sample": ["train"], "evaluate": ["manifest", "attach", "sample"],
        }  # fmt: skip
        facts = {"select": {"selector": own.select.selector}, "train": {"images": own.train.num_images}}
        for stage, inputs in reads.items():
            StageDir(folder / places[stage]).finish(
                {
                    "stage": stage, "fingerprint": places[stage], "inputs": {given: places[given] for given in inputs}, "rows_done": 40, "places": 2,
                    "seconds": seconds if stage == "train" else 1.0, "device": device, "facts": facts.get(stage, {}),
                }
            )  # fmt: skip
        write_json(folder / places["evaluate"] / "metrics.json", metrics(seed + number, {"train_images": own.train.num_images, **record}))
        arms[arm] = places
    write_json(folder / "plan.json", {"nodes": [], "arms": arms})
    write_text(folder / "config.yaml", to_yaml(config))
    return folder


def d2c(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(arg) for arg in args])
    out = capsys.readouterr()
    return int(ended.value.code or 0), out.out, out.err


def test_older_records_tell_their_real_images_apart() -> None:
    old = [{"reference_features": value} for value in ("a", "a", "b")]
    assert records.differences(old[:2]) == []
    assert records.differences(old[1:]) == [("reference_images", ["a", "b"])]
    assert records.differences([old[0], {"reference_images": "c"}]) == [("reference_images", ["a", "c"])]
    assert records.images_hash(["x", "y"]) == records.images_hash(iter(["y", "x"])) != records.images_hash(["x", "y", "y"])


def test_students_stand_side_by_side_with_floor_and_real(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = finished(tmp_path, "one", "arms.D2C.train.align_weight=0.5", "arms.Random.select.selector=random")
    other = finished(tmp_path, "other", "train.num_images=1024", seed=5, seconds=30.0)
    status, said, errors = d2c(capsys, "compare", one, other)
    assert status == 0, errors
    for folder, name in ((one / "eval-one0", "one: D2C"), (one / "eval-one1", "one: Random"), (other / "eval-other0", "other")):
        values = json.loads((folder / "metrics.json").read_text())["generated"]
        (line,) = [line for line in said.split("measured in efficientnet-lite2")[1].splitlines() if line.startswith(name)]
        assert line.split("  ")[0] == name
        for shown in (
            f"{values['frechet']:.2f}",
            f"{values['kid']:.4f} ± {values['kid_error']:.4f}",
            f"{values['recall']:.3f}",
            f"{values['coverage']:.3f}",
        ):
            assert shown in line
    assert said.count("real images, held out") == 1, "the same real images are one row"
    assert said.count("floor: its subset of 30") == 3
    assert "NOT trained on equal images: one: D2C 512, one: Random 512, other 1,024." in said
    assert "NOT trained in equal seconds: one: D2C 10.0 s, one: Random 10.0 s, other 30.0 s." in said
    bills = {line.split("  ")[0]: line for line in said.splitlines()[:4]}
    assert "17.0 (17 s)" in bills["one: D2C"] and "15.0 (15 s)" in bills["one: Random"], "a random choice needs neither teacher nor scores"
    assert "one seed each" in said


def test_other_measures_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = finished(tmp_path, "one"), finished(tmp_path, "other", seed=3, guidance=4.0)
    status, said, errors = d2c(capsys, "compare", *runs)
    assert (status, said) == (2, "")
    assert "guidance (guidance scale): 1.5 (one), 4.0 (other). --anyway shows them" in errors
    status, said, _ = d2c(capsys, "compare", *runs, "--anyway")
    assert status == 0
    assert said.index("  guidance (guidance scale)\n    one: 1.5\n    other: 4.0\n") < said.index("images kept")
    one, other = compare.gather([str(run) for run in runs])
    for key in records.DIFFERENT:
        other.metrics["record"] = {**RECORD, key: "another"} if key != "guidance" else {**RECORD, key: 3.0}
        with pytest.raises(UserError, match=rf"differ: {key} \("):
            compare.compare([one, other])


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ({"sample_seed": 1}, {"sample_seed": 2}),  # noise, not another measure
        ({"train_images": 1}, {"train_images": 2}),  # what is compared
        ({"bootstrap": 0}, {"bootstrap": 100}),
        ({"guidance_interval": None}, {"guidance_interval": [0.0, 1.0]}),
        ({"guidance": 1, "guidance_interval": [0.2, 0.8]}, {"guidance": 1.0, "guidance_channels": 3}),  # nothing acts
    ],
)  # fmt: skip
def test_what_does_not_change_the_number_is_no_difference(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert records.differences([{**RECORD, **mine}, {**RECORD, **theirs}]) == []


def test_what_one_does_not_say_is_a_difference() -> None:
    silent = {key: value for key, value in RECORD.items() if key != "sampler"}
    assert records.differences([RECORD, silent, RECORD]) == [("sampler", ["euler", None, "euler"])]


def test_seeds_are_one_student_with_its_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        finished(tmp_path, f"seed{seed}", f"train.seed={seed}", "resources.actors=1", seed=seed, seconds=10 + seed) for seed in range(3)
    ]
    other = finished(tmp_path, "other", "train.lr=1.0e-2", seed=7)
    status, said, errors = d2c(capsys, "compare", *runs, other, "--json")
    assert status == 0, errors
    three, alone = json.loads(said)["students"]
    each = [metrics(seed, {})["generated"]["frechet"] for seed in range(3)]
    assert three["members"] == ["seed0", "seed1", "seed2"] and three["seeds"] == {"train.seed": [0, 1, 2]}
    assert three["metrics"]["generated"]["frechet"] == pytest.approx(np.mean(each), rel=1e-12)
    assert three["metrics"]["generated"]["frechet_spread"] == pytest.approx(np.std(each, ddof=1), rel=1e-12)
    assert "frechet_spread" not in three["metrics"]["real"], "the real images are the same"
    assert (three["training_seconds"], alone["members"]) == (11.0, [])
    said = d2c(capsys, "compare", *runs, other)[1]
    assert f"{np.mean(each):.2f} ± {np.std(each, ddof=1):.2f}" in said
    assert "mean ± standard deviation of seed0, seed1, seed2 (train.seed 0, 1, 2)" in said
    assert "Trained on equal images: 512 each." in said and "Trained in equal seconds, within 10%" in said


def test_one_measurement_given_twice_is_no_second_seed(tmp_path: Path) -> None:
    one, other = finished(tmp_path, "one"), finished(tmp_path, "other", seed=1)
    assert [student.name for student in compare.gather([str(one), str(one / "eval-one0"), str(other)])] == ["one", "other"]
    with pytest.raises(UserError, match="'one' alone is not to be compared"):
        compare.gather([str(one), str(one / "eval-one0" / "metrics.json")])


def test_gpu_hours_are_of_the_stages_on_gpus(tmp_path: Path) -> None:
    (student,) = compare.find(str(finished(tmp_path, "one", device="H200", seconds=3600.0)))
    assert student.gpu_hours == pytest.approx((3600 + 7) * 2 / 3600)
    assert compare.find(str(finished(tmp_path, "other")))[0].gpu_hours is None


def test_records_of_anybodys_images_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unknown = {
        key: None for key in RECORD if key in ("sampler", "steps", "guidance", "weights", "ema_decay", "class_draw", "sample_precision")
    }
    for seed, name in enumerate(("theirs.json", "others.json")):
        write_json(tmp_path / name, metrics(seed, unknown))
    status, said, errors = d2c(capsys, "compare", tmp_path / "theirs.json", tmp_path / "others.json")
    assert status == 0, errors
    assert "is not known of" in said and "others.json" in said
    words = "sampler, sampling steps, guidance scale, which weights were sampled, decay of the averaged weights, VAE decoder, precision of the VAE decoder"
    assert f"note: not known, and so perhaps not alike: {words}, how classes were drawn, precision of sampling" in said
    status, _, errors = d2c(capsys, "compare", tmp_path / "theirs.json", finished(tmp_path, "ours"))
    assert status == 2 and "sampler (sampler): not known (" in errors and "euler (ours)" in errors


def test_the_page_says_whether_counts_are_equal() -> None:
    def page(generated: int) -> tuple[bool, str]:
        from jinja2 import Environment, FileSystemLoader

        found = metrics(0, {})
        found["counts"]["generated"] = generated
        (table,) = html.measured([SimpleNamespace(name="one", metrics=found)])  # type: ignore[list-item]
        source = FileSystemLoader(str(Path(html.__file__).parent)).get_source(Environment(), "page.html.jinja")[0]
        line = next(line for line in source.splitlines() if line.startswith("The held-out row"))
        return table["equal"], Environment().from_string(line).render(table=table)

    equal, said = page(80)
    assert equal and "score at the same count: no generator does better" in said
    equal, said = page(160)
    assert (
        not equal and "at the same count" not in said and "at another count than the generated ones, which moves a Fréchet distance" in said
    )


def test_what_no_record_says_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `d2c evaluate --out` writes it, without a word of the sampling; the rest is what is compared. A run's records say it all."""
    kept = ("network", "network_weights", "image_size", "generated", "reference", "neighbours", "kid_subsets", "kid_subset_size")
    silent = {key: value for key, value in RECORD.items() if key in kept}
    assert records.unknown(RECORD) == [] and records.unknown(silent)[:2] == ["sampler", "steps"]
    assert "network_image_size" in records.unknown(silent) and not {"network", "guidance_interval"} & set(records.unknown(silent))
    for seed, name in enumerate(("a.json", "b.json")):
        write_json(tmp_path / name, {**metrics(seed, {}), "record": silent})
    status, said, errors = d2c(capsys, "compare", tmp_path / "a.json", tmp_path / "b.json")
    assert status == 0, errors
    assert said.count("note: not known, and so perhaps not alike: sampler, sampling steps, guidance scale, ") == 1
    said = d2c(capsys, "compare", finished(tmp_path, "one"), finished(tmp_path, "two", seed=1))[1]
    assert "not known, and so" not in said
    _, said, _ = d2c(capsys, "compare", tmp_path / "a.json", finished(tmp_path, "ours"), "--anyway")
    assert "not known, and so" not in said, "a difference is said as one"


def test_the_precision_of_the_vae_is_of_the_measure() -> None:
    """Records from before it was said: of pixels there is none, of a VAE it is not known."""
    fp32, bf16 = ({**RECORD, "vae_decoder": "0123", "vae_precision": precision} for precision in ("fp32", "bf16"))
    old = {**RECORD, "vae_decoder": "0123"}
    assert records.differences([fp32, bf16]) == [("vae_precision", ["fp32", "bf16"])]
    assert records.differences([fp32, old]) == [("vae_precision", ["fp32", None])] and records.differences([old, old]) == []
    assert records.differences([RECORD, {**RECORD, "vae_precision": None}]) == []


def test_only_what_is_finished_is_compared(tmp_path: Path) -> None:
    one = finished(tmp_path, "one", "arms.D2C.train.lr=1.0e-3", "arms.Late.select.selector=random")
    (one / "eval-one1" / "_SUCCESS.json").unlink()
    with pytest.raises(UserError, match=r"'.*one' is not finished: its students \(Late\) are not measured yet"):
        compare.gather([str(one)])
    with pytest.raises(UserError, match="is not finished"):
        compare.gather([str(one / "eval-one1")])
    with pytest.raises(UserError, match="is nothing that can be compared; a finished run's folder"):
        compare.gather([str(tmp_path)])
    (tmp_path / "other.json").write_text('{"record": {}}')
    with pytest.raises(UserError, match="holds no measures with their evaluation record"):
        compare.gather([str(tmp_path / "other.json")])


def test_images_without_guidance_are_planned_where_they_are_another_sample(tmp_path: Path) -> None:
    def stages(*overrides: str) -> dict[str, plans.Node]:
        return plans.make(load(DEBUG, [f"run.dir={tmp_path}", *overrides])).arms["student"]

    plain, both, none = stages(), stages("evaluate.unguided=true", "sample.guidance_interval=[0.1,0.9]"), stages("sample.guidance=1")
    assert "unguided" not in plain and "unguided" not in stages("evaluate.unguided=true", "sample.guidance=1")
    assert both["evaluate"].inputs["unguided"] is both["unguided"]
    assert both["unguided"].config.sample.guidance == 1.0 and both["unguided"].config.sample.guidance_interval == (0.0, 1.0)
    assert both["unguided"].name == none["sample"].name, "a run without guidance finds what an unguided sampling made"
    assert both["evaluate"].name != plain["evaluate"].name
    assert plain["train"].name == both["train"].name == none["train"].name


def test_a_configuration_stands_for_its_run(tmp_path: Path) -> None:
    """Only where its own folders are finished: the plan names them, whatever else lies in the run folder."""
    write_text(tmp_path / "own.yaml", to_yaml(load(DEBUG, [f"run.dir={tmp_path}", "run.name=own"])))
    with pytest.raises(UserError, match=r"own.yaml' is not finished: its students are not measured yet"):
        compare.gather([str(tmp_path / "own.yaml")])
    node = plans.make(load(tmp_path / "own.yaml")).of("evaluate")[0]
    given = finished(tmp_path, "source")
    node.folder.parent.mkdir()
    for stage in given.iterdir():
        if stage.is_dir():
            stage.rename(node.folder.parent / (node.name if stage.name.startswith("eval-") else stage.name))
    (student,) = compare.find(str(tmp_path / "own.yaml"))
    assert (student.name, student.kept, student.seen, student.training_seconds) == ("own", 40, 512, 10.0)


def in_more(folder: Path, network: str, seed: int = 9, **facts: Any) -> Path:
    """A further network's measures in a finished run's metrics."""
    own = {key: value for key, value in metrics(seed, {}).items() if key not in ("record", "more", "unguided", "notices")}
    known = {"network": network, "weights": "89ab", "image_size": 299, "width": 4, **facts}
    (path,) = folder.glob("eval-*/metrics.json")
    held = json.loads(path.read_text())
    held["more"][network] = {**own, "network": known}
    write_json(path, held)
    return folder


@pytest.mark.parametrize(
    ("facts", "key"),
    [({"weights": "other"}, "network_weights"), ({"image_size": 224}, "network_image_size")],
)  # fmt: skip
def test_further_networks_must_be_alike_as_well(
    facts: dict[str, Any], key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = in_more(finished(tmp_path, "one"), "inception"), in_more(finished(tmp_path, "other", seed=3), "inception", **facts)
    status, said, errors = d2c(capsys, "compare", one, other)
    assert (status, said) == (2, "")
    assert f"differ: inception: {key} ({records.DIFFERENT[key]}): " in errors and "(one), " in errors
    status, said, _ = d2c(capsys, "compare", one, other, "--anyway")
    assert status == 0 and f"  inception: {key} ({records.DIFFERENT[key]})\n    one: " in said
    alike = in_more(finished(tmp_path, "alike", seed=4), "inception")
    assert d2c(capsys, "compare", one, alike, finished(tmp_path, "without", seed=5))[0] == 0, (
        "who was not measured in it is not shown in it"
    )


def test_every_network_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (in_more(finished(tmp_path, name, seed=seed), "inception") for seed, name in enumerate(("one", "other")))
    for folder in (one, other):
        path = folder / f"eval-{folder.name}0" / "metrics.json"
        held = json.loads(path.read_text())
        held["more"]["inception"]["too_few"] = "too few of them"
        write_json(path, held)
    _, said, _ = d2c(capsys, "compare", one, other)
    assert said.count("note: efficientnet-lite2: distances are in its features, not Inception's: none of them is an FID") == 1
    assert said.count("note: inception: the Fréchet distance is an FID") == 1
    assert said.count("note: inception: too few of them") == 1
    arms = [
        SimpleNamespace(metrics=json.loads(path.read_text()), selector="random") for path in sorted(tmp_path.glob("*/eval-*/metrics.json"))
    ]
    found = html.notices(None, arms)  # type: ignore[arg-type]
    assert [note for note in found if note.startswith("inception: ")] == [numbers.what_it_is("inception"), "inception: too few of them"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"record": []}, "record is no mapping"),
        ({"record": {}}, "its record names no network"),
        ({"record": {**RECORD, "guidance": "much"}}, "record.guidance is no number"),
        ({"counts": None}, "no mapping of measures with their counts"),
        ({"counts": {"generated": "80"}}, "counts.generated is no whole number"),
        ({"generated": []}, "generated is no mapping"),
        ({"generated": {"frechet": "small"}}, "generated.frechet is no number"),
        ({"real": None}, "real is no mapping"),
        ({"copying": {}}, "copying holds no distances"),
        ({"too_few": 3}, "too_few is no sentence"),
        ({"notices": {"a": 1}}, "notices are no sentences"),
        ({"more": [1]}, "more is no mapping"),
        ({"more": {"inception": None}}, "more.inception: no mapping of measures"),
        ({"unguided": {"counts": 1}}, "unguided: no mapping of measures"),
    ],
)  # fmt: skip
def test_what_others_wrote_is_refused_by_name(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {**metrics(0, {}), **change})
    with pytest.raises(UserError, match=words) as refusal:
        compare.gather([str(tmp_path / "a.json")])
    assert str(tmp_path / "a.json") in str(refusal.value)


def test_broken_folders_are_refused_by_name(tmp_path: Path) -> None:
    one = finished(tmp_path, "one")
    for content in ("{", "[]", "{}", '{"arms": []}', '{"arms": {"a": 1}}', '{"arms": {"a": {"evaluate": 3}}}', "[" * 100_000):
        write_text(one / "plan.json", content)
        for given in (one, one / "eval-one0"):
            with pytest.raises(UserError, match=r"plan\.json'"):
                compare.find(str(given))
    other = finished(tmp_path, "other")
    for content in ("{", "[]", "{}", '{"inputs": {"attach": 3}}'):
        write_text(other / "eval-other0" / "_SUCCESS.json", content)
        with pytest.raises(UserError, match="is not as a finished stage leaves it"):
            compare.find(str(other))
    for content in ("", "[" * 100_000, "\udcff"):
        (tmp_path / "b.json").write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(UserError, match=r"b\.json' cannot be read"):
            compare.find(str(tmp_path / "b.json"))
