"""Ray Train around the training loop: from a condensed dataset to a model folder.

Checkpoints go under the stage's folder or where resources.checkpoint_storage says (`checkpoints`); the same run after an
interruption finds them and goes on at the next image, on as many workers as there are then.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import ray.train.collective
import torch
from ray.exceptions import RayError
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from d2c_ray import logs
from d2c_ray import metrics as numbers
from d2c_ray.config import Config, ModelConfig, StorageConfig, TrainConfig, dotted
from d2c_ray.data import condensed
from d2c_ray.distributed import checkpoints, cluster, look, process_group, telemetry
from d2c_ray.errors import UserError
from d2c_ray.job import Job
from d2c_ray.models import latents, published, weights
from d2c_ray.models.frozen import check_weights
from d2c_ray.models.transformer import Transformer, TransformerSpec
from d2c_ray.progress import Progress
from d2c_ray.repeating import once, repeating
from d2c_ray.report.preview import Preview
from d2c_ray.rundir import SUCCESS, write_text
from d2c_ray.tracking import Trackers
from d2c_ray.training import online, state
from d2c_ray.training.online import Online

METRICS = "metrics.jsonl"
MODEL = "model"
FAILED = "failed.json"  # what a worker that must not be started again leaves for the driver
ASK_SEC = 2.0  # between two questions whether a node is about to be taken away: notices may be as short as 10 s
ASK_FIRST = 10  # steps between them until the first log tells the pace
GROW_SEC = 60.0  # between two looks of Ray's whether an elastic training can have more workers; then it starts all of them again
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


def condensed_facts(folder: Path) -> dict[str, Any]:
    """What a finished condensed dataset says of itself."""
    return json.loads((folder / SUCCESS).read_text())["facts"]


def train(job: Job, title: str, model: ModelConfig, options: TrainConfig, data: Path, workers: int, after: Path | None = None) -> int:
    """Trains a model on the condensed dataset at `data`, leaves it in the folder `job.out/model`, and says how many images it was shown.

    Args:
        after: folder of a finished training that did the same for fewer images: this one goes on where it ended.
    """
    if options.start:
        options = replace(options, start=published.absolute(options.start))  # a worker may work in another folder
    facts = condensed_facts(data)
    text = condensed.read_text(data / condensed.CLASSES) if (data / condensed.CLASSES).is_file() else None
    encoders = online.of(job.config, facts, model, options)
    vision_width = encoders.width or (condensed.vision_width(data, options.align_with) if options.align_weight > 0 else 0)
    num_classes = max(1, len(facts["class_names"]))
    spec = latents.transformer_spec(
        model, facts["latent"], num_classes, (text[0].shape[1], text[0].shape[2]) if text else None, vision_width, options.start
    )
    metrics = job.out / METRICS
    use_gpu = cluster.train_on_gpus(job.config.resources)
    if options.precision == "bf16" and not use_gpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        logs.say(f"{title}: this CPU only emulates bf16, which is many times slower than fp32: set precision=fp32", "warning")
    trackers = Trackers(
        job.config.tracking, job.out, f"{job.config.run.name}: {title}", f"{job.config.run.name}-{job.out.name}", dotted(job.config)
    )
    least = min(job.config.resources.train_workers_min or workers, workers)
    shown = math.ceil(options.num_images / options.batch_size) * options.batch_size  # whole steps
    before = _last(metrics if after is None or metrics.is_file() else after / METRICS)
    with (
        job.progress(shown, done=before.get("images", 0), title=title) as progress,
        _followed(metrics, progress, trackers, partial(cluster.training_waits_for, least, use_gpu)),
    ):
        checkpoint = fit(job.config, spec.to_dict(), options, data, facts, job.out, workers, use_gpu, encoders, after)
    with checkpoint.as_directory() as folder:
        _export(job, Path(folder), spec, options, facts, text)
        return _images(Path(folder))


def _export(job: Job, checkpoint: Path, spec: TransformerSpec, options: TrainConfig, facts: dict[str, Any], text: Any) -> None:
    raw = state.weights(checkpoint, "model")
    averages = [state.EMA, *map(state.average_name, options.ema_also)]
    weights.save(
        job.out / MODEL, spec, {"raw": raw, **{name: {**raw, **state.weights(checkpoint, name)} for name in averages}},
        {
            "class_names": facts["class_names"], "labels": facts["labels"], "latent": facts["latent"], "image_size": job.config.data.image_size,
            "text_strength": options.text_strength, "ema_decay": options.ema_decay, "images": _images(checkpoint), "fingerprint": job.fingerprint,
        },
        {"states": text[0].contiguous(), "mask": text[1].contiguous()} if text else None,
    )  # fmt: skip


def fit(
    config: Config, spec: dict[str, Any], train: TrainConfig, data: Path, facts: dict[str, Any], out: Path, workers: int,
    use_gpu: bool = False, encoders: Online = condensed.NOTHING, after: Path | None = None,
) -> Checkpoint:  # fmt: skip
    """Trains to the end, from the last checkpoint of an earlier attempt if there is one.

    Args:
        spec, train: the model and how to train it; `config` says with what resources.
        data, facts: the condensed dataset and what it says of itself.
        out: the stage's folder, which all workers can write to.
        encoders: what is encoded of the images as they are shown.
        after: as `train` takes it.

    Returns:
        The last checkpoint, on its storage.

    Raises:
        UserError: training cannot go on, and trying again would not help (it diverged, say); or the storage cannot be written to.
    """
    resources = config.resources
    where = checkpoints.where(resources.checkpoint_storage, out)
    checkpoints.check(where, config.storage)
    place = checkpoints.place(where, config.storage)
    mended = checkpoints.mend(place)
    (out / FAILED).unlink(missing_ok=True)
    if after is not None and not (out / METRICS).is_file():
        write_text(out / METRICS, (after / METRICS).read_text())
    least = min(resources.train_workers_min, workers)
    elastic = 0 < least < workers
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "spec": spec,
            "train": asdict(train),
            "data": str(data),
            "columns": condensed.training_columns(facts, train.align_with if spec["vision_width"] else None),
            "encoders": encoders,
            "start": published.facts(train.start)["hash"] if train.start else "",
            "cache_dir": resources.cache_dir,
            "keep_cache": resources.keep_cache,
            "out": str(out.absolute()),
            "threads": resources.threads,
            "micro_batch": resources.micro_batch,
            "recompute": resources.recompute,
            "where": where,
            "storage": asdict(config.storage),
            "preview": {"sample": config.sample, "report": config.report, "vae": config.vae, "labels": facts["labels"]},
            "mended": str(mended) if mended else "",
            "use_gpu": use_gpu,
            "most_workers": workers,
            "about": logs.here(),
            "beats": resources.watchdog_sec > 0,
            "after": checkpoints.newest(checkpoints.place(checkpoints.where(resources.checkpoint_storage, after), config.storage))
            if after
            else "",
            # cluster.connect says whether Ray watches for it.
            "notices": os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1") != "0",
        },
        torch_config=process_group.config(),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=(least, workers) if elastic else workers,  # type: ignore[arg-type]
            use_gpu=use_gpu,
            elastic_resize_monitor_interval_s=GROW_SEC,
        ),
        run_config=RunConfig(
            # The same name and path find the checkpoints of an interrupted run.
            name=checkpoints.NAME,
            storage_path=place.path,
            storage_filesystem=place.filesystem,
            checkpoint_config=CheckpointConfig(num_to_keep=train.keep_checkpoints),
            failure_config=FailureConfig(max_failures=resources.max_failures, max_preemption_failures=resources.max_preemptions),  # type: ignore[call-arg]
        ),
    )
    look.forget_workers(out)
    try:
        with _start_timeout(elastic):
            result = trainer.fit()
    except TrainingFailedError:
        if not resources.keep_cache:
            _drop_copies(str(data), resources.cache_dir)
        _raise_failed(out)
        raise
    finally:
        look.forget_workers(out)
    _raise_failed(out)
    checkpoints.tidy(place)
    if result.checkpoint is None:
        raise RuntimeError(f"training under {out} ended without a checkpoint")
    return result.checkpoint


@contextmanager
def _start_timeout(elastic: bool) -> Iterator[None]:
    """How long Ray's controller, which is started within, waits for room for the workers it has decided on.

    A fixed number may have to wait until the cluster has added nodes. An elastic one was decided on by what is free, and where
    that has gone meanwhile (a node that was just taken away still counts for a moment), only another decision helps.
    """
    if START_TIMEOUT in os.environ:
        yield
        return
    os.environ[START_TIMEOUT] = "15" if elastic else "900"
    try:
        yield
    finally:
        del os.environ[START_TIMEOUT]


def _raise_failed(out: Path) -> None:
    """Raises what a worker said for good."""
    with suppress(FileNotFoundError):
        raise UserError(json.loads((out / FAILED).read_text())["error"])


def _worker(args: dict[str, Any]) -> None:
    from d2c_ray.training import loop

    out, context = Path(args["out"]), ray.train.get_context()
    telemetry.adopt(args["about"])
    if not (out / FAILED).is_file():  # on another attempt it would only come again
        beat = look.Beat(out, context.get_world_rank(), context.get_world_size())
        try:
            with beat.beating() if args["beats"] else nullcontext():
                _train(args, out, beat)
        except UserError as error:
            # To raise it would have Ray start the workers again.
            write_text(out / FAILED, json.dumps({"error": str(error)}))
            if context.get_world_size() > 1 and not isinstance(error, loop.Diverged):
                raise  # the other workers are still at work, and only a failure ends them
    # Training is over. After a failure that is not the last, the copy is what the next attempt trains from.
    if context.get_local_rank() == 0 and not args["keep_cache"]:
        _drop_copy(args["data"], args["cache_dir"])


def _drop_copy(data: str, cache_dir: str) -> None:
    """Removes this node's copy of the dataset, if it can; how the training ended is what matters."""
    with suppress(UserError, OSError):
        condensed.drop_cache(data, cache_dir)


def _drop_copies(data: str, cache_dir: str) -> None:
    """The same on every node, when no worker is left to do it."""
    drop: Any = ray.remote(num_cpus=0, max_retries=0)(_drop_copy)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    started = [drop.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(data, cache_dir) for node in nodes]
    with suppress(RayError):
        ray.get(started, timeout=60)


def _train(args: dict[str, Any], out: Path, beat: look.Beat) -> None:
    from d2c_ray.training import loop

    torch.set_num_threads(args["threads"])
    context = ray.train.get_context()
    rank, metrics = context.get_world_rank(), out / METRICS
    train = TrainConfig(**{**args["train"], "betas": tuple(args["train"]["betas"])})
    aligned = args["spec"]["vision_width"] > 0
    if train.start:
        check_weights("train.start", published.facts(train.start)["hash"], args["start"])
    opened = condensed.open(args["data"], args["cache_dir"], args["columns"])
    data = opened.training_set(train.align_with if aligned else None, args["encoders"], ray.train.torch.get_device())
    place = checkpoints.place(args["where"], StorageConfig(**args["storage"]))
    upload = checkpoints.Uploads(place, rank, train.keep_every, train.batch_size)
    preview = None
    if train.preview_every:
        preview = _while_it_works(Preview(**args["preview"], text=opened.text, text_strength=train.text_strength, out=out))
    size, most = context.get_world_size(), args["most_workers"]
    notice = _Notice(train.batch_size, _Room(size, most, args["use_gpu"]) if size < most else None) if args["notices"] else None

    def log(values: dict[str, Any]) -> None:
        if notice is not None:
            notice.paced(values["images_per_sec"])
        beat.images = values["images"]
        if rank == 0:
            _count(values, train.batch_size)
            with metrics.open("a") as file:
                file.write(json.dumps(values, allow_nan=False) + "\n")

    def run(resume: Path | None) -> None:
        if rank == 0:
            _forget_after(metrics, _images(resume))
        loop.train(
            TransformerSpec(**args["spec"]), train, data, device=ray.train.torch.get_device(), rank=rank,
            world_size=context.get_world_size(), resume=resume, micro_batch=args["micro_batch"], recompute=args["recompute"],
            log=log, checkpoint=upload, urgent=notice, preview=preview,
        )  # fmt: skip

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None and args["mended"]:
        mended = Path(args["mended"])
        # Ray does not know of it, and a training without a step left would report nothing more.
        upload(_step(mended), state.Saver(lambda: state.read(mended)))
        run(mended)
    elif checkpoint is None and args["after"]:
        with Checkpoint(args["after"], filesystem=place.filesystem).as_directory() as folder:
            run(Path(folder))
    elif checkpoint is None:
        run(None)
    else:
        with checkpoint.as_directory() as folder:
            run(Path(folder))


# Of a training's record, what each number is called where it is monitored.
_COUNTED = {
    "images": "d2c_train_images", "images_per_sec": "d2c_train_images_per_second", "loss": "d2c_train_loss", "grad_norm": "d2c_train_grad_norm",
    "data_wait_share": "d2c_train_data_wait_share", "workers": "d2c_train_workers",
}  # fmt: skip


def _count(values: dict[str, Any], batch_size: int) -> None:
    for name, metric in _COUNTED.items():
        if isinstance(values[name], int | float):  # else it is no number any more, in words
            numbers.tell(metric, values[name])
    numbers.tell("d2c_train_step_seconds", batch_size / values["images_per_sec"])
    if logs.as_json():  # metrics.jsonl has it, and so has the driver's line
        logs.say(f"{values['images']:,} images, loss {values['loss']}", rows_done=values["images"], **values)


class _Notice:
    """Asks Ray whether a node is about to be taken away: on every worker at the same steps, since that is a barrier.

    The first answer that names a node asks for a checkpoint, so that little is lost when the workers are started again elsewhere;
    so does `grown`, where it is given, since Ray starts them again on more nodes too.
    """

    def __init__(self, batch_size: int, grown: Callable[[], bool] | None = None):
        self._batch_size, self._grown = batch_size, grown
        self._every = self._left = ASK_FIRST
        self._named: set[str] = set()

    def paced(self, images_per_sec: float) -> None:
        """Fits the steps between two questions to the pace, which is the same number on every worker."""
        self._every = max(1, int(ASK_SEC * images_per_sec / self._batch_size))
        self._left = min(self._left, self._every)

    def __call__(self, step: int) -> bool:
        self._left -= 1
        if self._left > 0:
            return False
        self._left = self._every
        info = ray.train.get_preemption_info()  # stays the same until the node is gone
        new = set(info.preempted_node_ids) - self._named if info is not None else set()
        self._named |= new
        return bool(new) | (self._grown is not None and self._grown())


class _Room:
    """Whether nodes have come that hold more workers; the same answer on every worker, who all ask at once.

    Ray tells nobody before it starts an elastic training again with more workers, but it looks every GROW_SEC alone: who sees the
    room first has time to save the state. Room that others take has cost a checkpoint.
    """

    def __init__(self, workers: int, most: int, on_gpus: bool):
        self._room, self._most, self._on_gpus = workers, most, on_gpus

    def __call__(self) -> bool:
        room = 0
        if ray.train.get_context().get_world_rank() == 0:
            room = min(cluster.room(cluster.nodes(), float(self._on_gpus)), self._most)
        before, self._room = self._room, ray.train.collective.broadcast_from_rank_zero(room)
        return self._room > before


def _while_it_works(preview: Callable[[int, Transformer], None]) -> Callable[[int, Transformer], None]:
    """The same without its failures: the first one is told, and there are no further previews. The training goes on."""
    works = True

    def tried(images: int, model: Transformer) -> None:
        nonlocal works
        if not works:
            return
        try:
            preview(images, model)
        except Exception as error:  # no encoder, no memory, no room on the disk: a picture is not worth a training
            works = False
            logs.say(f"no more previews after {images} images: {type(error).__name__}: {' '.join(str(error).split())}", "warning")

    return tried


def _step(resume: Path) -> int:
    return json.loads((resume / state.META).read_text())["step"]


def _images(resume: Path | None) -> int:
    return json.loads((resume / state.META).read_text())["images"] if resume is not None else 0


def _forget_after(metrics: Path, images: int) -> None:
    """Drops the metrics of steps that will be taken again."""
    with suppress(FileNotFoundError):
        kept = [line for line in metrics.read_text().splitlines() if line and _parsed(line).get("images", images + 1) <= images]
        write_text(metrics, "".join(line + "\n" for line in kept))


def _parsed(line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # the last line of a killed run
        return {}


@contextmanager
def _followed(metrics: Path, progress: Progress, trackers: Trackers, waiting: Callable[[], str]) -> Iterator[None]:
    """While the block lasts, follows a metrics file, which the workers write: for the progress line and for trackers.

    Until there is a first line, the progress line says what `waiting` does.
    """
    lines = Tail(metrics)

    def show() -> None:
        records = [record for record in map(_parsed, lines.new()) if record]
        trackers.follow(records)  # also where there are none: a preview comes after its record
        if records:
            last = records[-1]
            progress.at(last["images"], f"loss {float(last['loss']):.3f}", last.get("images_per_sec"))
        elif not lines.read:
            progress.at(progress.done, waiting() if ray.is_initialized() else "starting")

    whole = False
    try:
        with repeating(show, 0.5, "d2c-metrics"):
            yield
        whole = True
    finally:
        try:
            once(show, "d2c-metrics")  # its own failure neither hides the training's nor ends a good one
        finally:
            trackers.close(whole=whole)


class Tail:
    """The lines of a file that grows, and that a resumed training replaces by a shorter one; each is read once."""

    def __init__(self, path: Path):
        self._path, self._file = path, (0, 0)
        self.read = 0  # bytes

    def new(self) -> list[str]:
        """The whole lines that were added since the last call; all of them where the file is another one."""
        try:
            with self._path.open("rb") as file:
                facts = os.fstat(file.fileno())
                if (facts.st_dev, facts.st_ino) != self._file or facts.st_size < self.read:
                    self._file, self.read = (facts.st_dev, facts.st_ino), 0
                file.seek(self.read)
                found = file.read()
        except FileNotFoundError:
            return []
        whole = found[: found.rfind(b"\n") + 1]
        self.read += len(whole)
        return whole.decode().splitlines()


def _last(metrics: Path) -> dict[str, Any]:
    with suppress(FileNotFoundError, IndexError, json.JSONDecodeError):
        return json.loads(metrics.read_text().splitlines()[-1])
    return {}
