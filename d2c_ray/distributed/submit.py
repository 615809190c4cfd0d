"""`d2c submit`: a command of d2c as a job of a Ray cluster.

The job is `python -m d2c_ray.cli COMMAND CONFIG ...` in Ray's own copy of the uploaded folder, as `jobs/pipeline.py` and `jobs/sweep.py`
are with `ray job submit`. Credentials are not sent along: the job has the environment of the cluster.
"""

import asyncio
import logging
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import ray
import requests
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env import packaging
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from d2c_ray import config as configs
from d2c_ray.distributed.cluster import answers
from d2c_ray.errors import UserError
from d2c_ray.rundir import commit_of, run_folder
from d2c_ray.wording import first_line, redacted

# Besides what .gitignore and .rayignore name, and .git, .venv, venv and __pycache__, which Ray leaves out itself. Without a slash at
# their ends folders match too, and are not walked through file by file.
EXCLUDES = (
    "/runs", "/build", "/dist", "*.egg-info", ".*_cache", ".cache", ".hypothesis", ".tox", ".nox", ".eggs", ".ipynb_checkpoints", "node_modules",
    "wandb", "mlruns",
    # Where credentials lie.
    ".env*", "*.env", ".netrc", "_netrc", ".git-credentials", ".pypirc", ".npmrc", ".ray", ".aws", ".azure", ".boto", ".s3cfg", ".databrickscfg",
    ".ssh", ".gnupg", ".kube", "kubeconfig", ".docker", ".config", ".huggingface", ".mlflow", ".vault-token", "*.pem", "*.key", "*.p12", "*.pfx",
    "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "credentials", "credentials.json", "secrets.yaml", "secrets.yml", "secrets.json", "secrets.toml",
)  # fmt: skip
LIMIT_BYTES = packaging.GCS_STORAGE_MAX_SIZE  # an upload has to stay below
MOST_NAMED = 4  # of what makes an upload large
STOPPED, INTERRUPTED, LOST = 143, 130, 1  # exit statuses besides 0 and the job's own
ENDED_SEC = 30.0  # longest wait between a job's last line and its state
ANSWER_SEC = 60.0  # longest wait for an answer of the cluster
SILENT_SEC = 20.0  # of a log, after which the cluster is asked whether the job is still there
PATIENCE_SEC = 180.0  # without any answer, after which it is given up
# Fields that may name a file or a folder that is read, besides attach.also and evaluate.more_networks; and values that name none.
PATHS = (
    "data.path", "data.classes", "teacher.checkpoint", "teacher.classes", "teacher.train.start", "train.start", "vae.path", "attach.text.encoder",
    "attach.vision.encoder", "evaluate.network", "evaluate.reference", "evaluate.inception",
)  # fmt: skip
NAMES = {"", "none", "minilm", "wordnet", configs.INCEPTION, *configs.EFFICIENTNETS, *configs.DINOV2}
SCHEMES = ("", "http", "https", "ray")  # of an address; any other one Ray takes for a module, which it imports
FROM_S3 = ("data.path", "data.classes")
KEPT = ("run.dir", "resources.checkpoint_storage", "resources.cache_dir", "tracking.mlflow_uri")  # where a job writes
TOKEN = (
    "Ray takes one from RAY_AUTH_TOKEN, from the file of RAY_AUTH_TOKEN_PATH or from ~/.ray/auth_token, with RAY_AUTH_MODE=token; the cluster's own "
    "(on its head: `ray get-auth-token`) would do."
)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What is submitted.

    Attributes:
        folder: what is uploaded.
        files: of it, by name relative to it, with their bytes.
        excludes: patterns of what is not.
    """

    folder: Path
    files: dict[str, int]
    excludes: list[str]
    entrypoint: str
    metadata: dict[str, str]


def prepare(config: str, overrides: list[str], command: str, folder: str, exclude: list[str], metadata: list[str]) -> Job:
    """Checks all that can be seen without the cluster.

    Args:
        config: the configuration file, in `folder`.
        command: of d2c.
        exclude: patterns, as of a .gitignore, of what is not uploaded.
        metadata: `key=value`, kept with the job besides what d2c says itself.

    Raises:
        UserError: a configuration that cannot run; a run folder that is not on storage of all nodes by its name; files that the job
            would miss; an upload that is too large, or of a whole home folder; credentials in the metadata, which the dashboard shows.
    """
    given, root = configs.load(config, overrides), Path(os.path.abspath(os.path.expanduser(folder)))
    if command == "sweep":
        from d2c_ray import trials

        trials.check(given)
    for key in KEPT:
        _kept(key, configs.get(given, key), root)
    more = {}
    for pair in metadata:
        key, equals, value = pair.partition("=")
        if redacted(pair) != pair:
            raise UserError("--metadata holds a user name or a password, or a token, and whoever sees the cluster's jobs sees it too.")
        if not equals or not key:
            raise UserError(f"--metadata {pair}: key=value would do.")
        more[key] = value
    if not root.is_dir():
        raise UserError(f"--working-dir {folder}: there is no such folder.")
    if root.resolve() in (Path.home().resolve(), Path(root.anchor)):
        raise UserError(
            f"--working-dir {folder}: all of '{root}' would be uploaded, and what is private in it. A folder of its own would do."
        )
    excludes = [*EXCLUDES, *exclude]
    if Path(given.run.dir).is_relative_to(root) and Path(given.run.dir) != root:
        excludes.append(f"/{Path(given.run.dir).relative_to(root)}")
    files = uploaded(root, excludes)
    names = [_name(path, root, files) for path in configs.files(config)]
    for key, value in _named(given):
        _reached(key, value, root, files)
    _fits(root, files)
    return Job(
        root, files, excludes, shlex.join(["python", "-m", "d2c_ray.cli", command, names[-1], "resources.address=auto", *overrides]),
        {
            "job_name": f"{given.run.name} {command}", "config": names[-1], "overrides": shlex.join(overrides), "run": str(run_folder(given)),
            **({"commit": commit} if (commit := commit_of(root)) else {}), **more,
        },
    )  # fmt: skip


def uploaded(root: Path, excludes: list[str]) -> dict[str, int]:
    """The files that Ray would upload of a folder, relative to it, with their bytes."""
    found: dict[str, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            found[path.relative_to(root).as_posix()] = path.stat().st_size

    # Ray's own walk: what counts is what it takes.
    matches = packaging._get_excludes(root, [*get_runtime_env_default_excludes(), *excludes])
    silent = logging.getLogger("d2c_ray.silent")
    silent.setLevel(logging.CRITICAL)
    packaging._dir_travel(
        root, [matches], note, include_gitignore=os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1", logger=silent
    )
    return found


def _name(file: Path, root: Path, files: dict[str, int]) -> str:
    """A configuration file's name in the upload."""
    path = Path(os.path.abspath(file))
    if not path.is_relative_to(root):
        raise UserError(
            f"'{file}' lies outside '{root}', which is what is uploaded. A copy in it would do, or --working-dir with a folder that holds it "
            "(and d2c_ray, where the cluster has not installed it)."
        )
    name = path.relative_to(root).as_posix()
    if name not in files:
        raise UserError(
            f"'{file}' is not uploaded: a .gitignore, a .rayignore or --exclude names it, or it lies in a folder of outputs. A copy elsewhere would do."
        )
    return name


def _kept(key: str, value: str, root: Path) -> None:
    """Refuses a place to write to that goes with Ray's copy of the folder, or with a pod."""
    path = value if key == "run.dir" else _path(value)
    if Path(path).is_absolute() or (not path and key != "run.dir"):  # an empty run.dir is the folder that the job works in
        return
    where = (
        "an absolute path on a node's disk, such as /scratch"
        if key.endswith("cache_dir")
        else "an absolute path on storage that every node sees, such as /shared/runs"
    )
    why = (
        "lies in a home folder, and the cluster's is another"
        if path.startswith("~")
        else f"is relative: a job works in Ray's own copy of '{root.name}', which Ray removes again"
    )
    raise UserError(f"{key}={value} {why}; {where} would do.")


def _path(value: str) -> str:
    """The path that a folder, a database or a URL of one stands for; empty where it is none."""
    parts = urlsplit(value)
    if parts.scheme in ("", "file"):
        return "" if value.startswith("databricks") else parts.path
    return parts.path[1:] if parts.scheme == "sqlite" else ""


def _named(given: configs.Config) -> Iterator[tuple[str, str]]:
    """(key, value) of all that may name something to read: in the configuration, in its arms and on the axes of its sweep."""
    seen: set[str] = set()
    for prefix, config in (("", given), *((f"arms.{name}.", arm) for name, arm in configs.arm_configs(given).items() if given.arms)):
        found = [(key, str(configs.get(config, key))) for key in PATHS]
        found += [(f"attach.also.{name}.encoder", vision.encoder) for name, vision in config.attach.also.items()]
        found += [("evaluate.more_networks", network) for network in config.evaluate.more_networks]
        yield from ((prefix + key, value) for key, value in found if value not in seen)
        seen.update(value for _, value in found)
    for key, values in given.sweep.axes.items():
        if (key in PATHS or key.startswith("attach.also.")) and isinstance(values, list):
            yield from ((f"sweep.axes.{key}", str(value)) for value in values)


def _reached(key: str, value: str, root: Path, files: dict[str, int]) -> None:
    """Refuses a relative path that is there, here, and would not be for the job. What is not here may be a hub's name, or the cluster's."""
    if value in NAMES or "://" in value or Path(value).expanduser().is_absolute() or _holds(files, os.path.normpath(value)):
        return
    here = Path(os.path.abspath(value))
    if not here.exists() and not (root / value).exists():
        return
    name = here.relative_to(root).as_posix() if here.is_relative_to(root) else ""
    if _holds(files, name):
        raise UserError(f"{key}={value} is not uploaded by that name: the job works in '{root}', and {name} would do.")
    s3 = ", or s3://" if key.endswith(FROM_S3) else ""
    raise UserError(
        f"{key}={value} is not uploaded, and the job would not find it: an absolute path on storage that every node sees would do{s3}."
    )


def _holds(files: dict[str, int], name: str) -> bool:
    """Whether a file, or a folder of some, is uploaded."""
    return name in files or any(file.startswith(f"{name}/") for file in files)


def _fits(root: Path, files: dict[str, int]) -> None:
    total = sum(files.values())
    if total < LIMIT_BYTES:
        return
    top: Counter[str] = Counter()
    for name, size in files.items():
        first, slash, _ = name.partition("/")
        top[first + slash] += size
    largest = sorted(files.items(), key=lambda file: -file[1])[:MOST_NAMED]
    raise UserError(
        f"the upload of '{root}' takes {_mib(total)} in {len(files):,} files, and Ray takes less than {_mib(LIMIT_BYTES)}. Most is in "
        f"{', '.join(f'{name} ({_mib(size)})' for name, size in top.most_common(MOST_NAMED))}; the largest files are {', '.join(f'{name} ({_mib(size)})' for name, size in largest)}. "
        "--exclude PATTERN, a .gitignore or a .rayignore leaves out what the job does not read; images and weights belong on storage that every node sees."
    )


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def submit(job: Job, address: str, name: str, wait: bool, say: Say) -> int:
    """Submits a job and follows it.

    Args:
        address: of the cluster; empty: as Ray finds it.
        name: submission id; empty: one of Ray's.
        wait: follow the job to its end.

    Returns:
        The exit status: 0, the job's own, STOPPED, INTERRUPTED (which leaves the job running) or LOST.

    Raises:
        UserError: no cluster there, a token that is missing or wrong, a name that is taken.
    """
    logging.getLogger("ray.dashboard").setLevel(logging.WARNING)
    with _addressed(address), _refused(address):
        client = _Client(address or None)
        if name:
            _untaken(client, name)
        say(f"uploading {_mib(sum(job.files.values()))} in {len(job.files):,} files, unless the cluster has them already")
        environment = {"working_dir": str(job.folder), "excludes": job.excludes}
        name = client.submit_job(
            entrypoint=job.entrypoint, runtime_env=environment, metadata=dict(job.metadata), submission_id=name or None
        )
        where = client.get_address()
    say(f"{name} is submitted to {where}: {job.entrypoint}; its run folder: {job.metadata['run']}")
    ways = f"`ray job logs --address {where} --follow {name}` follows it, `ray job stop --address {where} {name}` stops it"
    if not wait:
        say(ways)
        return 0
    try:
        return asyncio.run(_follow(client, name, say))
    except KeyboardInterrupt:
        say(f"the job goes on: {ways}, and d2c status {job.metadata['run']} says how far it is.")
        return INTERRUPTED


class _Client(JobSubmissionClient):
    """Ray's own client would wait for ever for a head that is gone."""

    def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> requests.Response:
        return super()._do_request(method, endpoint, **{"timeout": ANSWER_SEC, **kwargs})


@contextmanager
def _addressed(address: str) -> Iterator[None]:
    """Ray lets its environment overrule the address it is given; what stands on the command line counts here."""
    before = {key: os.environ.pop(key) for key in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS") if address and key in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


@contextmanager
def _refused(address: str) -> Iterator[None]:
    """Ray's own errors as ones of the user's; asks first whether anything listens there, for which Ray would wait for minutes."""
    given = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "auto"
    if redacted(given) != given:
        raise UserError(
            f"--address{'' if address else ', as the environment gives it,'} holds a user name or a password, or a token. {TOKEN}"
        )
    parts = urlsplit(given if "://" in given else f"//{given}")
    try:
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        port, parts = None, parts._replace(scheme="none")
    if parts.scheme not in SCHEMES:
        raise UserError(f"--address {given}: http://HEAD:8265, the dashboard's address, would do, or HEAD:PORT.")
    if parts.hostname and port:
        reason = answers(parts.hostname, port)
        if reason:
            raise UserError(
                f"--address {given}: no Ray cluster answers there ({reason}). http://HEAD:8265, the dashboard's address, would do."
            )
    try:
        yield
    except AuthenticationError as error:
        raise UserError(f"--address {given}: the cluster refuses the token: {first_line(error)} {TOKEN}") from None
    except (ConnectionError, requests.exceptions.RequestException) as error:
        raise UserError(
            f"--address {given}: no Ray cluster answers there ({first_line(error)}). http://HEAD:8265, the dashboard's address, would do."
        ) from None
    except RuntimeError as error:
        raise UserError(
            f"--address {given}: the cluster (this is Ray {ray.__version__}) does not take the job: {first_line(error)}"
        ) from None


def _untaken(client: JobSubmissionClient, name: str) -> None:
    with suppress(RuntimeError):  # of a job that is not there
        state = client.get_job_info(name).status
        raise UserError(
            f"--submission-id {name}: there is a job of that name ({state}), and Ray takes each once; another one would do, or none. The run goes on by its run folder."
        )


async def _follow(client: JobSubmissionClient, name: str, say: Say) -> int:
    """Prints the job's log as it grows, over lost connections too, and gives its exit status."""
    shown, since = 0, time.monotonic()  # characters; of the last answer
    logging.getLogger(JobSubmissionClient.__module__).setLevel(logging.WARNING)  # it tells of every connection to a log that closes

    def answered() -> None:
        nonlocal since
        since = time.monotonic()

    while True:
        try:
            log, skip = client.tail_job_logs(name), shown  # each begins at the log's beginning
            while (text := await _next(client, name, log, answered)) is not None:
                fresh, skip = text[skip:], max(0, skip - len(text))
                sys.stdout.write(fresh)
                sys.stdout.flush()
                shown += len(fresh)
                answered()
            details = await _ended(client, name)
            answered()
            if details is not None:
                return _exit_status(details, name, say)
        except (OSError, RuntimeError, aiohttp.ClientError, requests.exceptions.RequestException) as error:
            if time.monotonic() - since > PATIENCE_SEC:
                say(f"the cluster is lost ({first_line(error)}); what becomes of {name} is not known.")
                return LOST
        await asyncio.sleep(1.0)


async def _next(client: JobSubmissionClient, name: str, log: AsyncIterator[str], answered: Callable[[], None]) -> str | None:
    """More of a job's log; None where it has ended. A head that is gone without a word ends no connection, so that silence is asked after.

    Args:
        answered: told of every answer.
    """
    piece = asyncio.ensure_future(anext(log, None))
    try:
        while True:
            done, _ = await asyncio.wait({piece}, timeout=SILENT_SEC)
            if done:
                return piece.result()
            over = client.get_job_info(name).status.is_terminal()
            answered()
            if over:
                return None
    finally:
        piece.cancel()


async def _ended(client: JobSubmissionClient, name: str) -> JobDetails | None:
    """How a job ended whose log has ended; None where it goes on."""
    until = time.monotonic() + ENDED_SEC
    while time.monotonic() < until:
        details = client.get_job_info(name)
        if details.status.is_terminal():
            return details
        await asyncio.sleep(0.2)
    return None


def _exit_status(details: JobDetails, name: str, say: Say) -> int:
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        say(f"{name} was stopped; the same command goes on from there.")
        return STOPPED
    code = details.driver_exit_code
    if not code:  # it never came to run
        say(f"{name} failed: {(details.message or 'Ray does not say why').strip()}")
        return LOST
    say(f"{name} failed with exit status {code}.")
    return 128 - code if code < 0 else code  # as a shell says it of one that a signal ended
