"""A run folder: stage outputs that appear whole, a lock, and what happened.

runs/<name>/  config.yaml  plan.json  status.json
  <stage>-<hash8>/  part-*.parquet ... _SUCCESS.json
  report.html
"""

import json
import os
import re
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2c_ray.config import Config
from d2c_ray.errors import UserError, no_room

SUCCESS = "_SUCCESS.json"
PROGRESS = "_progress.json"
STATUS = "status.json"
PLAN = "plan.json"
LOCKS = ".locks"  # of stages, in a run folder
UMASK = os.umask(0)  # can only be read by setting it, which threads must not do
os.umask(UMASK)


def run_folder(config: Config) -> Path:
    """Where a configuration's run lies."""
    return Path(config.run.dir).expanduser().absolute() / config.run.name


def now() -> str:
    """The time as files of a run folder say it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def write_text(path: Path, text: str) -> None:
    """Writes a file whole: under a temporary name beside it, then renamed."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`, for bytes."""
    with whole(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """As `write_text`, for a value of JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}")  # as `whole` names it


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a temporary name in the same folder; renames it to `path` if the block ends without an error.

    Raises:
        UserError: the disk is full.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o666 & ~UMASK)  # mkstemp makes files for the owner alone; outputs are shared like any other
        os.replace(temporary, path)
    except Exception as error:
        full = no_room(error, path)
        if full is None:
            raise
        raise full from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_own(folder: Path, what: str, elsewhere: str, secret: bool) -> None:
    """Refuses a folder of a place that is everyone's, such as /tmp, that others could have put something into.

    Args:
        what: is in it, for the message. elsewhere: a sentence, what to do about it. secret: whether others must not look into it either.

    Raises:
        UserError: it is a link, somebody else's, or open to others.
    """
    found = folder.lstat()
    if stat.S_ISLNK(found.st_mode) or not stat.S_ISDIR(found.st_mode):
        wrong = "is a link or no folder"
    elif found.st_uid != os.getuid():
        wrong = f"belongs to the user number {found.st_uid}"
    elif found.st_mode & (0o077 if secret else 0o022):
        wrong = f"is open to other users (mode {stat.S_IMODE(found.st_mode):o}; chmod 700 closes it)"
    else:
        return
    raise UserError(f"{folder}, for {what}, {wrong}. Name a folder of your own: {elsewhere}")


@dataclass(frozen=True)
class StageDir:
    """The folder of one stage's output."""

    path: Path

    @property
    def done(self) -> bool:
        return (self.path / SUCCESS).is_file()

    def success(self) -> dict[str, Any]:
        """What the finished stage recorded: counts, seconds, versions, inputs and its own facts."""
        return json.loads((self.path / SUCCESS).read_text())

    def finish(self, record: dict[str, Any]) -> None:
        """Marks the folder as whole. Comes last."""
        write_json(self.path / SUCCESS, record)
        (self.path / PROGRESS).unlink(missing_ok=True)

    def clear(self) -> None:
        """Removes what killed processes were writing here. While nobody else does."""
        for folder, _, names in os.walk(self.path):
            for name in filter(_TEMPORARY.fullmatch, names):
                Path(folder, name).unlink(missing_ok=True)

    def seconds_so_far(self) -> float:
        """Seconds that earlier, interrupted attempts spent here, as far as they could say."""
        with suppress(FileNotFoundError, json.JSONDecodeError, KeyError):
            return float(json.loads((self.path / PROGRESS).read_text())["seconds"])
        return 0.0

    def parts(self, prefix: str = "part-") -> list[Path]:
        """The Parquet files of the table, in order."""
        return sorted(self.path.glob(f"{prefix}*.parquet"))


@contextmanager
def maker(folder: Path, say: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Holds a stage's folder for one process of a run that has several; waits for another that makes it.

    The operating system lets go of it when that process ends, however it ends: a maker that dies is replaced by who waits.
    """
    from filelock import FileLock, Timeout

    path = folder.parent / LOCKS / f"{folder.name}.lock"  # not inside: a dataset ships as it is
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{folder.name} is being made by another process; waiting for it")
        lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()


def place_seconds(success: dict[str, Any]) -> float:
    """What a finished stage took of the places it ran on, seconds of a GPU or of a core each."""
    return success.get("place_seconds", success["seconds"] * success["places"])


class Lock:
    """Holds a run folder for one process; the operating system lets go of it when the process ends, however it ends."""

    def __init__(self, folder: Path):
        from filelock import FileLock

        self.folder = folder
        self._owner = folder / ".owner.json"
        self._lock = FileLock(folder / ".lock")

    def __enter__(self) -> "Lock":
        from filelock import Timeout

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            owner: dict[str, Any] = {}
            with suppress(FileNotFoundError, json.JSONDecodeError):
                owner = json.loads(self._owner.read_text())
            who = f"process {owner['pid']} on {owner['host']} since {owner['since']}" if owner else "another process"
            raise UserError(
                f"the run folder '{self.folder}' is being written by {who}. Wait for it, end it, or give this run another run.name."
            ) from None
        except OSError as error:
            raise no_room(error, self.folder) or UserError(
                f"the run folder '{self.folder}' cannot be written ({error.strerror}); another run.dir would do."
            ) from None
        write_json(self._owner, {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")})
        return self

    def __exit__(self, *exc: object) -> None:
        self._owner.unlink(missing_ok=True)
        self._lock.release()


def pid_namespace() -> int:
    """Tells apart processes of one number in several containers of a machine; 0 where the system has no such thing."""
    with suppress(OSError):
        return os.stat("/proc/self/ns/pid").st_ino
    return 0


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, and the commit where the package runs from a checkout."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in (
        "d2c-ray",
        "torch",
        "ray",
        "numpy",
        "pyarrow",
        "pillow",
        "transformers",
        "diffusers",
        "tokenizers",
        "safetensors",
        "clean-fid",
    ):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    commit = commit_of(Path(__file__).resolve().parents[1])
    if commit:
        found["commit"] = commit
    return found


def commit_of(root: Path) -> str:
    """The commit that a checkout is at, with '-dirty' where it was changed; empty where there is none."""
    import subprocess

    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
