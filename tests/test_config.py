"""The configuration: what is refused, and with which words."""

from pathlib import Path

import pytest
from conftest import ROOT

from d2c_ray import config
from d2c_ray.errors import UserError


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_loads(path: Path) -> None:
    loaded = config.load(path)
    assert loaded.run.name == path.stem
    assert config.arm_configs(loaded)


def test_written_configuration_reads_back_the_same(tmp_path: Path) -> None:
    given = config.load(ROOT / "configs" / "quickstart.yaml", ["select.budget=0.1", "train.betas=[0.8,0.99]"])
    (tmp_path / "config.yaml").write_text(config.to_yaml(given))
    assert config.load(tmp_path / "config.yaml") == given


def test_a_prompt_takes_the_whole_name_or_the_first() -> None:
    for template in ("a {name}", "a {first}", "a {first} ({name})"):
        text = config.load(None, ["attach.text.encoder=minilm", f"attach.text.template='{template}'"]).attach.text
        assert text.template == template
    with pytest.raises(UserError, match=r"has no \{name\} \(or \{first\}\)"):
        config.load(None, ["attach.text.encoder=minilm", "attach.text.template=photo"])


def test_command_line_wins_over_the_file() -> None:
    assert config.load(ROOT / "configs" / "quickstart.yaml", ["select.budget=77"]).select.budget == 77


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("select.bugdet=5", ["select.bugdet", "did you mean 'budget'"]),
        ("selct.budget=5", ["selct", "did you mean 'select'"]),
        ("evaluate.steps=5", ["evaluate.steps", "did you mean 'sample.steps'"]),
        ("train.lr=fast", ["train.lr", "fast"]),
        ("train=3", ["train is a section", "num_images"]),
        ("select.budget=-4", ["select.budget=-4", "number of images"]),
        ("select.budget=10.5", ["select.budget=10.5"]),
        ("select.f=1.5", ["select.f=1.5", "up to 1"]),
        ("select.cutoff=1", ["select.cutoff=1.0", "to below 1"]),
        ("select.strata=0", ["select.strata=0", "1 or more"]),
        ("select.selector=intervall", ["select.selector", "did you mean 'interval'"]),
        ("sample.guidance=0.5", ["sample.guidance=0.5", "1 is no guidance"]),
        ("score.t_min=0.9 score.t_max=0.1", ["score.t_min=0.9", "t_min < t_max"]),
        ("model.width=30", ["width 30"]),
        ("model.patch=3", ["data.image_size=32", "model.patch=3"]),
        ("data.image_size=256", ["data.image_size=256", "vae.path"]),
        ("data.max_rejected=3", ["data.max_rejected=3", "0 to 1"]),
        ("train.batch_size=0", ["train.batch_size=0"]),
        ("attach.text.encoder=minilm attach.text.template=nothing", ["attach.text.template", "{name}"]),
        ("attach.vision.encoder=none attach.also.large.encoder=dinov2-l", ["train.align_with", "(large)"]),
        ("attach.also.large.encode=dinov2-l", ["attach.also.large.encode", "encoder"]),
        ("attach.also.a-b.encoder=dinov2-l", ["attach.also.a-b", "underscores"]),
        ("attach.vision.encoder=dinov2-x", ["attach.vision.encoder", "dinov2-s"]),
        ("attach.also.x.storage=int4", ["attach.also.x.storage", "int8"]),
        ("train.align_with=larg attach.also.large.encoder=dinov2-l", ["train.align_with", "large"]),
        ("attach.vision.encoder=efficientnet-lite0 evaluate.network=efficientnet-lite0", ["evaluate.network", "aligned"]),
        ("sample.sampler=ddpm", ["sample.sampler=ddpm", "euler"]),
        ("select.k=9 select.f=0.5", ["select.k=9", "one of the two"]),
        ("arms.a.data.path=x", ["arms.a.data", "select, attach, model, train"]),
        ("arms.a.select.selectr=random", ["arms.a.select.selectr", "did you mean 'selector'"]),
        ("model.kind=dit sample.steps=1001", ["sample.steps=1001", "1000"]),
        ("run.dir=s3://bucket/x", ["run.dir=s3://bucket/x", "mounted"]),
        (
            "attach.text.encoder=minilm attach.text.template=a{name}-{style}",
            ["attach.text.template", "{name} and {first} are the only fields"],
        ),
        ("nonsense", ["key=value"]),
    ],
)
def test_bad_values_are_refused_by_name(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        config.load(None, override.split())
    for word in words:
        assert word in str(refusal.value)


def test_missing_file_names_where_presets_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"configs/quickstart\.yaml"):
        config.load(tmp_path / "none.yaml")


def test_arms_change_only_what_they_name() -> None:
    base = config.load(None, ["arms.a.select.selector=random", "arms.b.train.align_weight=0"])
    arms = config.arm_configs(base)
    assert (arms["a"].select.selector, arms["a"].train.align_weight) == ("random", 0.5)
    assert (arms["b"].select.selector, arms["b"].train.align_weight) == ("interval", 0.0)


def test_sizes_are_the_published_ones() -> None:
    assert config.model_shape(config.ModelConfig(size="XL")) == (28, 1152, 16)
    assert config.model_shape(config.ModelConfig(size="S", depth=3)) == (3, 384, 6)
