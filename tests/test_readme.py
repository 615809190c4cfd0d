"""What the README says is what there is."""

import re

from conftest import ROOT

from d2c_ray import cli, config
from d2c_ray.plan import FOLDERS, STAGES

README = (ROOT / "README.md").read_text()


def test_both_command_lines_stand_at_the_top_and_ci_finds_them() -> None:
    head = README.splitlines()[:6]
    lines = [line.split("#")[0].strip() for line in head if line.startswith("    pip install -e ")]
    assert lines == ["pip install -e '.[quickstart]' && d2c run configs/quickstart.yaml", "pip install -e '.[dev]' && pytest"]
    script = (ROOT / ".ci" / "run").read_text()
    assert "'&& pytest'" in script
    assert "'&& d2c run'" in script


def test_commands_and_fields_exist() -> None:
    for command, path in re.findall(r"`?d2c (\w+) (configs/\S+\.yaml)", README):
        assert command in cli.COMMANDS
        assert (ROOT / path).is_file()
    known = config.describe()
    for field in re.findall(r"^\| `([^|]+)` \|", README, re.MULTILINE):
        for name in re.findall(r"[\w.]+", field.replace("`", " ").replace(" or ", " ")):
            assert name in known or any(key.startswith(name + ".") for key in known), name


def test_the_tree_names_every_folder_of_a_run() -> None:
    for stage in STAGES:
        assert re.search(rf"^      {FOLDERS.get(stage, stage)}-[0-9a-f]{{8}}/", README, re.MULTILINE), stage
