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


MARK = "s3cr3t-m4rk"
HOLDING = [  # as a field, a key or a whole override
    f"user:{MARK}@host:9000", f"https://host/?token={MARK}", f"s3://bucket/x?X-Amz-Signature={MARK}&x=1", f"https:/user:{MARK}@host",
    f"https://user:{MARK}/x@host", f"databricks://profile,https://user:{MARK}@host", f"postgresql+psycopg2://user:{MARK}@host/db",
    f"https://{MARK}@host", f"https://user:p@{MARK}@host", f"https://host/c?sv=1&sig={MARK}", f"https://host/#access_token={MARK}",
]  # fmt: skip


@pytest.mark.parametrize("text", HOLDING)
def test_credentials_are_refused_wherever_they_stand_and_never_said(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(f"tracking: {{wandb: '{text}'}}\n")
    (tmp_path / "key.yaml").write_text(f"arms: {{'{text}': {{}}}}\n")
    (tmp_path / "broken.yaml").write_text(f"tracking: '{text}\n")
    (tmp_path / "over.yaml").write_text("base: x.yaml\n")
    given: list[tuple[Path | None, list[str]]] = [(tmp_path / f"{name}.yaml", []) for name in ("x", "key", "broken", "over")]
    given += [
        (None, [f"{key}={text}"]) for key in ("tracking.mlflow", "data.source", "data.image_size", "run.name", "storage.endpont", "x")
    ]
    given += [(None, [f"sweep.axes={{'{text}': [1, 2]}}"]), (None, [text]), (None, [f"storage.{text}"]), (None, [f"train.betas=[{text}]"])]
    for path, overrides in given:
        with pytest.raises(UserError) as raised:
            config.load(path, overrides)
        assert MARK not in str(raised.value), (path, overrides)
        assert path == tmp_path / "broken.yaml" or "holds a user name or a password, or a token" in str(raised.value)
    with pytest.raises(UserError) as raised:
        config.evaluate_options([f"data.path={text}"], {})
    assert MARK not in str(raised.value)


def test_what_is_no_credential_is_left_alone() -> None:
    given = config.load(None, ["data.path=s3://bucket/a@2x", "data.classes=/data/me@home/classes.txt", "attach.text.tokens=16"])
    assert given.data.path == "s3://bucket/a@2x"


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:SECRET}",
        "a ${oc.env:SECRET} b",
        "${oc.decode:${oc.env:SECRET}}",
        "\\${oc.env:SECRET}",
        "${${run.dir}:SECRET}",
        "${ oc.env:SECRET}",
        "${",
    ],
)
def test_nothing_of_the_environment_gets_into_a_configuration(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", MARK)
    (tmp_path / "x.yaml").write_text(f"tracking: {{wandb: '{text}'}}\n")
    (tmp_path / "base.yaml").write_text(f"base: '{text}'\n")
    (tmp_path / "arm.yaml").write_text(f"arms: {{a: {{train: {{start: '{text}'}}}}}}\n")
    for path, overrides in (*((tmp_path / f"{name}.yaml", []) for name in ("x", "base", "arm")), (None, [f"tracking.wandb='{text}'"])):
        with pytest.raises(UserError, match=r"\$\{") as raised:
            config.load(path, overrides)
        assert MARK not in str(raised.value)


def test_other_keys_are_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", MARK)
    (tmp_path / "x.yaml").write_text("run: {name: a}\ntracking: {wandb: '${run.name}-b', mlflow: '$'}\n")
    assert config.load(tmp_path / "x.yaml").tracking.wandb == "a-b"
    with pytest.raises(UserError, match=r"tracking\.wandb holds '\$\{'"):  # which came together of two
        config.load(tmp_path / "x.yaml", ["tracking.wandb=${tracking.mlflow}{oc.env:SECRET}"])


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/b", "..", ".", "a/"])
def test_a_run_stays_in_its_folder(name: str) -> None:
    with pytest.raises(UserError, match=r"run\.name=.* a single one"):
        config.load(None, [f"run.name={name}"])


def test_command_line_wins_over_the_file() -> None:
    assert config.load(ROOT / "configs" / "quickstart.yaml", ["select.budget=77"]).select.budget == 77


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.source=digits data.path=/my/images", ["data.path=/my/images with data.source=digits", "data.source=auto would do"]),
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
        ("attach.also.large.encodr=dinov2-l", ["attach.also.large.encodr", "encoder"]),
        ("attach.also.a-b.encoder=dinov2-l", ["attach.also.a-b", "underscores"]),
        ("attach.vision.encoder=dinov2-x", ["attach.vision.encoder", "dinov2-s"]),
        ("attach.also.x.storage=int4", ["attach.also.x.storage", "int8"]),
        ("train.align_with=larg attach.also.large.encoder=dinov2-l", ["train.align_with", "large"]),
        ("attach.vision.encoder=efficientnet-lite0 evaluate.network=efficientnet-lite0", ["evaluate.network", "aligned"]),
        ("evaluate.network=inceptoin", ["evaluate.network='inceptoin'", "did you mean 'inception'", "dinov2-l", "a local folder"]),
        ("evaluate.more_networks=[inception,resnet]", ["evaluate.more_networks='resnet'", "efficientnet-lite0"]),
        ("evaluate.more_networks=[inception,inception]", ["evaluate.more_networks names inception twice"]),
        ("evaluate.more_networks=[efficientnet-lite2]", ["evaluate.more_networks names efficientnet-lite2", "as evaluate.network does"]),
        (
            "attach.vision.encoder=facebook/dinov2-large evaluate.network=dinov2-l",
            ["evaluate.network=dinov2-l", "aligned", "efficientnet-lite2"],
        ),
        (
            "select.selector=herding embed.encoder=efficientnet-lite2",
            ["evaluate.network=efficientnet-lite2", "chooses in", "efficientnet-lite0"],
        ),
        ("sample.sampler=ddpm", ["sample.sampler=ddpm", "euler"]),
        ("vae.encode=training", ["vae.encode=training", "vae.path"]),
        ("vae.encode=training vae.path=a/b score.cache_latents=true", ["score.cache_latents=true", "vae.encode=training"]),
        ("select.k=9 select.f=0.5", ["select.k=9", "one of the two"]),
        ("arms.a.data.path=x", ["arms.a.data", "select, attach, model, train"]),
        ("arms.a.select.selectr=random", ["arms.a.select.selectr", "did you mean 'selector'"]),
        ("model.kind=dit sample.steps=1001", ["sample.steps=1001", "1000"]),
        ("run.dir=s3://bucket/x", ["run.dir=s3://bucket/x", "mounted"]),
        (
            "attach.text.encoder=minilm attach.text.template=a{name}-{style}",
            ["attach.text.template", "{name} and {first} are the only fields"],
        ),
        ("train.warmup_images=-1", ["train.warmup_images=-1", "0 or more"]),
        ("teacher.train.keep_every=-1", ["teacher.train.keep_every=-1"]),
        ("train.betas=[1.5,0.999]", ["train.betas=[1.5, 0.999]", "[0.9, 0.999]"]),
        ("train.lr=inf", ["train.lr=inf", "finite"]),
        ("train.num_images=0", ["train.num_images=0", "train.start"]),
        ("train.ema_also=[0.9999]", ["train.ema_also=[0.9999]", "twice"]),
        ("sample.weights=ema-0.99 train.ema_also=[0.999]", ["sample.weights='ema-0.99'", "ema-0.999"]),
        ("model.kind=dit model.path=cosine", ["model.path=cosine", "sit"]),
        ("resources.train_workers_min=2", ["resources.train_workers_min=2", "resources.train_workers=1"]),
        ("tracking.mlflow_uri=https://me:secret@host/x", ["tracking.mlflow_uri", "MLFLOW_TRACKING_PASSWORD"]),
        ("nonsense", ["key=value"]),
    ],
)
def test_bad_values_are_refused_by_name(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        config.load(None, override.split())
    for word in words:
        assert word in str(refusal.value)
    assert "secret" not in str(refusal.value)


def test_a_further_network_may_be_one_that_flatters_and_is_known_to() -> None:
    found = config.load(None, ["attach.vision.encoder=dinov2-b", "evaluate.more_networks=[facebook/dinov2-base,dinov2-l]"])
    assert "students are aligned with (attach.vision.encoder)" in (config.flattering(found, "facebook/dinov2-base") or "")
    assert config.flattering(found, "dinov2-l") is None
    chosen = config.load(None, ["select.selector=k_center", "evaluate.more_networks=[efficientnet-lite0]"])
    assert "select.selector=k_center chooses in (embed.encoder)" in (config.flattering(chosen, "efficientnet-lite0") or "")


def test_a_file_stands_on_its_base(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text("select: {budget: 500, k: 3}\ntrain: {lr: 0.5, num_images: 64}\n")
    (tmp_path / "middle.yaml").write_text("base: base.yaml\nselect: {budget: 600}\n")
    (tmp_path / "sub" / "top.yaml").write_text("base: ../middle.yaml\ntrain: {lr: 0.25}\n")
    found = config.load(tmp_path / "sub" / "top.yaml", ["train.num_images=128"])
    assert (found.select.budget, found.select.k, found.train.lr, found.train.num_images) == (600, 3, 0.25, 128)
    assert found.run.name == "top"
    assert "base" not in config.to_yaml(found).splitlines()[0] and config.load(tmp_path / "middle.yaml").train.lr == 0.5


def test_a_base_that_is_not_there_or_leads_back_is_refused(tmp_path: Path) -> None:
    for name, base, words in (
        ("gone", "other.yaml", r"gone\.yaml' says base: other\.yaml, and there is no file"),
        ("self", "self.yaml", r"leads back to itself: self\.yaml -> self\.yaml"),
        ("a", "b.yaml", r"leads back to itself: a\.yaml -> b\.yaml -> a\.yaml"),
        ("b", "a.yaml", r"leads back to itself: b\.yaml -> a\.yaml -> b\.yaml"),
        ("list", "[1]", r"base: \[1\] is no file name"),
    ):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}\n")
        if name != "a":
            with pytest.raises(UserError, match=words):
                config.load(tmp_path / f"{name}.yaml")
    with pytest.raises(UserError, match=r"a\.yaml -> b\.yaml -> a\.yaml"):
        config.load(tmp_path / "a.yaml")
    with pytest.raises(UserError, match="unknown configuration key 'base'"):
        config.load(None, ["base=gone.yaml"])


def test_missing_file_names_where_presets_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"configs/quickstart\.yaml"):
        config.load(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"is a folder, and a configuration is a file; it holds no \.yaml file\.$"):
        config.load(tmp_path)
    for name in "edcba":
        (tmp_path / f"{name}.yaml").touch()
    with pytest.raises(
        UserError, match=r"is a folder.*a file in it would do: .*/a\.yaml, .*/b\.yaml, .*/c\.yaml, .*/d\.yaml and 1 more\.$"
    ):
        config.load(tmp_path)


def test_arms_change_only_what_they_name() -> None:
    base = config.load(None, ["arms.a.select.selector=random", "arms.b.train.align_weight=0"])
    arms = config.arm_configs(base)
    assert (arms["a"].select.selector, arms["a"].train.align_weight) == ("random", 0.5)
    assert (arms["b"].select.selector, arms["b"].train.align_weight) == ("interval", 0.0)


def test_sizes_are_the_published_ones() -> None:
    assert config.model_shape(config.ModelConfig(size="XL")) == (28, 1152, 16)
    assert config.model_shape(config.ModelConfig(size="S", depth=3)) == (3, 384, 6)


@pytest.mark.parametrize(("size", "words"), [(2, "3"), (10_001, "3 to 10,000 would do"), (100_000, "0.7 GiB")])
def test_a_subset_of_the_kid_has_three_to_ten_thousand_images(size: int, words: str) -> None:
    with pytest.raises(UserError, match=r"evaluate\.kid_subset_size=") as refusal:
        config.load(None, [f"evaluate.kid_subset_size={size}"])
    assert words in str(refusal.value)
    assert config.load(None, ["evaluate.kid_subset_size=10000"]).evaluate.kid_subset_size == 10_000
