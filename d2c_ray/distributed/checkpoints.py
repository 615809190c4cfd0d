"""Where a training's checkpoints lie, and how they get there while training goes on.

<storage>/checkpoints/checkpoint_<time>/ holds a state, checkpoint_manager_snapshot.json says which are whole: Ray's own layout,
which the same command finds again. <storage>/kept/images-<count>/ holds those that are kept for good. <storage> is the stage's
folder, or <resources.checkpoint_storage>/<run>/<stage>.
"""

import json
import os
import re
import shutil
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray.train
from pyarrow import fs
from ray.train import Checkpoint
from safetensors import SafetensorError, safe_open

from d2c_ray import logs, metrics
from d2c_ray.config import StorageConfig
from d2c_ray.data import storage
from d2c_ray.errors import UserError
from d2c_ray.rundir import UMASK
from d2c_ray.training import state
from d2c_ray.training.loop import crosses
from d2c_ray.wording import redacted

NAME = "checkpoints"
KEPT = "kept"
INDEX = "checkpoint_manager_snapshot.json"
_CHECKPOINT = re.compile(r"checkpoint_[\w.-]+", re.ASCII)  # as Ray names them
TRIES = 3  # to write a state to a remote storage, each with storage.attempts a request
CHUNK_BYTES, CHUNKS = 16 << 20, 8  # a part of an upload, and how many are on their way at most
PAUSE_SEC = 1.0  # before the second try, and twice that before the third


@dataclass(frozen=True)
class Place:
    """A folder for one training's checkpoints, as Ray Train takes it."""

    path: str  # on `filesystem`
    filesystem: fs.FileSystem
    options: StorageConfig = field(default_factory=StorageConfig)  # that `filesystem` was made with

    @property
    def local(self) -> Path | None:
        return Path(self.path) if isinstance(self.filesystem, fs.LocalFileSystem) else None


def where(root: str, stage: Path) -> str:
    """The folder for the checkpoints of the stage with folder `stage`: below `root`, a folder or s3://bucket/prefix; empty: that folder itself.

    Its run's name is part of it: runs that share a root may have stages of the same name.
    """
    stage = stage.absolute()
    if not root:
        return str(stage)
    return storage.join(root if storage.is_remote(root) else str(Path(root).expanduser().absolute()), f"{stage.parent.name}/{stage.name}")


def place(where: str, options: StorageConfig) -> Place:
    """The folder `where` on its file system."""
    if storage.is_remote(where):
        return Place(where.removeprefix(storage.S3).rstrip("/"), _s3(options), options)
    return Place(where, fs.LocalFileSystem())


def check(where: str, options: StorageConfig) -> None:
    """Refuses a place that cannot be written to, before workers are started for it.

    Raises:
        UserError: what the storage said.
    """
    storage.check(where)
    found = place(where, options)
    marker = f"{found.path}/written-here"
    try:
        found.filesystem.create_dir(found.path)
        found.filesystem.open_output_stream(marker).close()
        found.filesystem.delete_file(marker)
    except OSError as error:
        hint = f" The bucket must be there; see storage.endpoint and storage.region. {storage.WHERE}" if storage.is_remote(where) else ""
        raise UserError(
            f"resources.checkpoint_storage: checkpoints cannot be written to '{where}': {' '.join(redacted(str(error)).split())}.{hint}"
        ) from None


def _s3(options: StorageConfig) -> fs.S3FileSystem:
    """S3 as `storage` says. Each process looks for credentials itself: none are pickled, and none are written down."""
    endpoint = urlsplit(options.endpoint)
    chosen: dict[str, Any] = {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme} if options.endpoint else {}
    if options.region:
        chosen["region"] = options.region
    return fs.S3FileSystem(
        anonymous=options.anonymous, connect_timeout=options.timeout_sec, request_timeout=options.timeout_sec,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=options.attempts), **chosen,
    )  # fmt: skip


def index(place: Place) -> dict[str, Any]:
    """What Ray's index of a place's checkpoints says; nothing where there is none.

    Raises:
        UserError: it names a checkpoint that does not lie beside it. Ray would read that one, and remove it as soon as it is old enough.
        JSONDecodeError: half an index.
    """
    try:
        with place.filesystem.open_input_stream(f"{place.path}/{NAME}/{INDEX}") as file:
            found = json.loads(file.read())
    except FileNotFoundError:
        return {}
    for name in _names(found):
        if not isinstance(name, str) or not _CHECKPOINT.fullmatch(name):
            raise UserError(
                f"'{place.path}/{NAME}/{INDEX}' names the checkpoint {name!r}, which is no folder beside it, as those are that a training leaves "
                "(checkpoint_...). Move the training's folder away; the same command trains anew."
            )
    return found if isinstance(found, dict) else {}


def _names(found: Any) -> Iterator[Any]:
    """Every name of a checkpoint in an index, however deep."""
    if isinstance(found, dict):
        for key, value in found.items():
            if key == "checkpoint_dir_name":
                yield value
            else:
                yield from _names(value)
    elif isinstance(found, list):
        for value in found:
            yield from _names(value)


def mend(place: Place) -> Path | None:
    """Sets aside checkpoints whose index Ray was writing when it was killed, and finds the newest whole one among them.

    Ray does not write its index whole, and refuses to start on half of one. On S3 an object appears whole or not at all, so
    there is nothing to mend. What was set aside goes when an index names a checkpoint again.

    Raises:
        UserError: as `index`.
    """
    if place.local is None:
        with suppress(json.JSONDecodeError):
            index(place)
        return None
    folder = place.local / NAME
    try:
        if index(place).get("checkpoint_results"):
            for aside in folder.parent.glob(f"{folder.name}-set-aside-*"):
                shutil.rmtree(aside, ignore_errors=True)
        if (folder / INDEX).is_file():
            return None
    except json.JSONDecodeError:
        folder.rename(folder.with_name(f"{folder.name}-set-aside-{len(list(folder.parent.glob(folder.name + '-*')))}"))
    whole = []
    for state_file in folder.parent.glob(f"{folder.name}-set-aside-*/checkpoint_*/{state.META}"):
        with suppress(json.JSONDecodeError, SafetensorError, FileNotFoundError), safe_open(state_file.with_name(state.STATE), "pt"):
            whole.append((json.loads(state_file.read_text())["step"], state_file.parent))
    return max(whole)[1] if whole else None


def newest(place: Place) -> str:
    """The path, on the place's file system, of the last checkpoint of a finished training; empty where it is gone."""
    try:
        last = index(place).get("latest_checkpoint_result")
    except json.JSONDecodeError:
        return ""
    path = f"{place.path}/{NAME}/{last['checkpoint_dir_name']}" if last else ""
    return path if path and place.filesystem.get_file_info(f"{path}/{state.META}").type == fs.FileType.File else ""


def tidy(place: Place) -> None:
    """Removes what was on its way when a worker or the driver was killed, or S3 failed: checkpoints that no index names, and parts of uploads.

    While nobody writes.
    """
    named = {result["checkpoint_dir_name"] for result in index(place).get("checkpoint_results", [])}
    for entry in place.filesystem.get_file_info(fs.FileSelector(f"{place.path}/{NAME}")) if named else []:
        if entry.type == fs.FileType.Directory and entry.base_name.startswith("checkpoint_") and entry.base_name not in named:
            with suppress(OSError):
                place.filesystem.delete_dir(entry.path)
    if place.local is None:
        _forget_unfinished(place)


def _forget_unfinished(place: Place) -> None:
    """Has S3 forget the parts of what never came to be. If it does not, they stay, and training has ended all the same."""
    where = f"{storage.S3}{place.path}"
    try:
        storage.forget_unfinished(where, place.options)
    except (UserError, OSError) as error:
        logs.say(
            f"uploads below '{where}' that were cut off, if there are any, stay stored; a lifecycle rule of the bucket can end them: {error}",
            "warning",
        )


class Uploads:
    """Brings a training's states to its storage in the background, one at a time. On every rank; rank 0 has the states.

    Args:
        keep_every: images between the checkpoints that are kept for good; 0: none are.
        batch: images a step.
    """

    def __init__(self, place: Place, rank: int, keep_every: int, batch: int):
        self._place, self._rank, self._keep_every, self._batch = place, rank, keep_every, batch
        self._last_done = threading.Event()
        self._last_done.set()

    def __call__(self, step: int, save: state.Saver) -> None:
        """As `loop.train` calls it. Returns when the state is copied; what is later than that does not change it."""
        if self._rank != 0:
            # A barrier: every worker reports, rank 0 brings the state.
            ray.train.report({"step": step}, checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC)
            return
        self._last_done.wait()  # so that one copy of the state is in memory at most
        images = step * self._batch
        keep = self._keep_every and crosses(images, self._batch, self._keep_every)
        upload = _Upload(self._place, save.snapshot(), f"{self._place.path}/{KEPT}/images-{images:09d}" if keep else "")
        done = self._last_done = upload.done
        # Without a call too: Ray drops it where a report comes to nothing, since another worker has died.
        weakref.finalize(upload, done.set)
        try:
            ray.train.report(
                {"step": step},
                # Ray's own file system, which it compares the new checkpoint's with; `upload` gives that one its path.
                checkpoint=Checkpoint(self._place.path, filesystem=ray.train.get_context().get_storage().storage_filesystem),
                checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
                checkpoint_upload_fn=upload,
                delete_local_checkpoint_after_upload=False,  # there is none, and the path is the whole place's
            )
        except BaseException:
            done.set()
            raise


class _Upload:
    """Brings one state to its storage; a `checkpoint_upload_fn`.

    What a storage refuses is tried again here, however Ray takes the error. Ray calls again after some errors, how often is
    its own affair: by then the state has left the memory, and the same error is raised again.

    Attributes:
        done: set when the state is no longer held, whether it was written or not.
    """

    def __init__(self, place: Place, taken: state.Snapshot, kept: str):
        self._place, self._kept = place, kept
        self._taken: state.Snapshot | None = taken
        self._since = time.monotonic()
        self._error: Exception | None = None
        self.done = threading.Event()

    def __call__(self, known: Checkpoint, name: str) -> Checkpoint:
        path = f"{self._place.path}/{NAME}/{name}"
        try:
            self._bring(path)
        finally:
            self._taken = None  # Ray may hold on to this function
            self.done.set()
        metrics.tell("d2c_checkpoint_seconds", time.monotonic() - self._since)
        return Checkpoint(path, filesystem=known.filesystem)

    def _bring(self, path: str) -> None:
        if self._error is not None:
            raise self._error
        assert self._taken is not None
        for left in reversed(range(TRIES)):
            try:
                self._place.filesystem.create_dir(path)
                _write(self._place, path, self._taken)
                break
            except Exception as error:
                # The frames of an error that somebody keeps would keep the state too.
                traceback.clear_frames(error.__traceback__)
                if not left or self._place.local is not None or not isinstance(error, OSError):
                    self._error = error
                    raise
            time.sleep(PAUSE_SEC * 2 ** (TRIES - 1 - left))
        if self._kept:
            _keep(self._place, path, self._kept, self._taken)


def _write(place: Place, path: str, taken: state.Snapshot) -> None:
    if place.local is not None:
        taken.write(Path(path))
        return
    with tempfile.TemporaryDirectory() as folder:
        taken.write(Path(folder))
        for name in (state.STATE, state.META):
            # Not by fs.copy_files, which loses the error of a part that is refused when the file is closed.
            with open(Path(folder) / name, "rb") as source, place.filesystem.open_output_stream(f"{path}/{name}") as target:
                for number, chunk in enumerate(iter(partial(source.read, CHUNK_BYTES), b""), start=1):
                    target.write(chunk)
                    if number % CHUNKS == 0:
                        target.flush()  # or all that is not sent yet waits in memory, a second state on a slow storage


def _keep(place: Place, source: str, target: str, taken: state.Snapshot) -> None:
    """Keeps the checkpoint at `source`, of the state `taken`, under a second name. If that fails, training goes on without it."""
    try:
        if place.local is None:
            _write(place, target, taken)  # in parts: S3 copies no object of more than 5 GiB; it is whole with its state.json, the last
        else:
            _link(source, target)
    except Exception as error:  # whatever it is, the checkpoint itself is written
        logs.say(
            f"the checkpoint is not kept at '{target}', and training goes on: {type(error).__name__}: {' '.join(redacted(str(error)).split())}",
            "warning",
        )


def _link(source: str, target: str) -> None:
    """Gives a checkpoint a second name, by a rename of hard links: it appears whole."""
    if Path(target).is_dir():
        return  # of the same steps, taken before an interruption
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{Path(target).name}.", dir=Path(target).parent))
    try:
        for name in (state.STATE, state.META):
            try:
                os.link(f"{source}/{name}", temporary / name)
            except OSError:  # a file system without hard links
                shutil.copyfile(f"{source}/{name}", temporary / name)
        temporary.chmod(0o777 & ~UMASK)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
