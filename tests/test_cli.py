"""The command line as a user meets it, without running a stage."""

import errno
import json
import subprocess
import sys

import pytest
from conftest import DEBUG, ROOT

from d2c_ray import cli, logs


def d2c(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "d2c_ray.cli", *args], capture_output=True, text=True, cwd=ROOT)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, json\nfrom d2c_ray import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "print(json.dumps([m for m in ('torch', 'ray', 'pyarrow', 'numpy', 'omegaconf', 'rich', 'transformers') if m in sys.modules]), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stderr) == []
    assert "Commands:" in done.stdout


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_shows_an_example(command: str) -> None:
    done = d2c(command, "--help")
    assert done.returncode == 0
    example = f"d2c {command} {'DiT-XL-2-256x256.pt' if command == 'import-model' else 'configs/'}"
    assert example in done.stdout
    assert example in d2c("--help").stdout


@pytest.mark.parametrize("command", [command for command in cli.COMMANDS if command != "import-model"])
def test_examples_of_the_help_load(command: str) -> None:
    from d2c_ray.config import CHOICES, load

    _, name, path, *rest = cli.COMMANDS[command][1].split()
    assert name == command
    if command == "explain":
        _key, *rest = rest
    if command == "selectors":
        assert rest[0] == "--only" and set(rest[1].split(",")) <= set(CHOICES["select.selector"])
        rest = rest[2:]
    if command == "compare":
        load(ROOT / rest[0])
        rest = rest[1:]
    if command == "plan":
        assert rest[-2:] == ["--gpus", "8xH100"]
        rest = rest[:-2]
    if command == "verify":
        assert rest == ["--images", "0"]
        rest = []
    if command == "export-model":
        assert rest[1:] == ["--weights", "ema"]
        rest = []
    if command == "export":
        from d2c_ray.data.export import FORMS

        assert rest[0] in FORMS
        rest = rest[2:]
    load(ROOT / path, rest)


def test_a_mistake_is_one_line_and_exit_status_2() -> None:
    done = d2c("run", str(DEBUG), "train.lrr=3")
    assert done.returncode == 2
    assert done.stderr.startswith("d2c: unknown configuration key 'train.lrr'; did you mean 'lr'?")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("format", ["plain", "json"])
def test_what_a_library_raises_is_told_whole_and_without_credentials(
    format: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: object) -> None:
        raise ConnectionError("no answer of http://me:marked@bucket:9000/x?token=marked")

    monkeypatch.setattr(cli, "_run", refused)
    monkeypatch.setattr(logs, "_process", logs.About(format=format))
    with pytest.raises(SystemExit) as end:
        cli.main(["run", "configs/quickstart.yaml"])
    said = capsys.readouterr().err
    assert end.value.code == 1 and "Traceback (most recent call last)" in said and "no answer of http://***@bucket:9000" in said
    assert "marked" not in said


def test_a_broken_pipe_is_only_passed_over_where_it_is_that_of_the_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(*words: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(cli, "_run", gone)
    with pytest.raises(SystemExit) as end:
        cli.main(["run", "configs/quickstart.yaml"])
    said = capsys.readouterr().err
    assert end.value.code == 1 and "BrokenPipeError" in said and "a process that this one talks to has ended" in said
    done = subprocess.run(
        f"{sys.executable} -m d2c_ray.cli config configs/quickstart.yaml | true", shell=True, cwd=ROOT, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr, done.stderr


def test_config_prints_the_resolved_configuration() -> None:
    done = d2c("config", str(DEBUG), "select.budget=17")
    assert done.returncode == 0
    assert "budget: 17" in done.stdout
    assert "guidance: 1.5" in done.stdout, "defaults are shown too"


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "jobs" / "bench").glob("*.py")))
def test_benchmarks_start(script: str) -> None:
    """As they are called: their folder is then the first that Python imports from."""
    done = subprocess.run([sys.executable, str(ROOT / "jobs" / "bench" / script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--quick" in done.stdout
