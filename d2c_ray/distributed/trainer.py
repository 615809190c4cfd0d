"""Ray Train around the training loop: from a condensed dataset to a model folder.

Checkpoints go under the stage's folder; the same run after an interruption finds them and goes on at the next image.
"""

import json
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from safetensors import SafetensorError, safe_open

from d2c_ray.config import ModelConfig, ResourcesConfig, TrainConfig
from d2c_ray.data import condensed
from d2c_ray.distributed import cluster
from d2c_ray.errors import UserError
from d2c_ray.job import Job
from d2c_ray.models import latents, weights
from d2c_ray.models.transformer import TransformerSpec
from d2c_ray.progress import Progress
from d2c_ray.rundir import SUCCESS, write_text
from d2c_ray.training import state

METRICS = "metrics.jsonl"
MODEL = "model"


def condensed_facts(folder: Path) -> dict[str, Any]:
    """What a finished condensed dataset says of itself."""
    return json.loads((folder / SUCCESS).read_text())["facts"]


def train(job: Job, title: str, model: ModelConfig, options: TrainConfig, data: Path, workers: int) -> None:
    """Trains a model on the condensed dataset at `data` and leaves it in the folder `job.out/model`."""
    facts = condensed_facts(data)
    text = condensed.read_text(data / condensed.CLASSES) if (data / condensed.CLASSES).is_file() else None
    vision_width = condensed.vision_width(data, options.align_with) if options.align_weight > 0 else 0
    num_classes = max(1, len(facts["class_names"]))
    spec = latents.transformer_spec(
        model, facts["latent"], num_classes, (text[0].shape[1], text[0].shape[2]) if text else None, vision_width
    )
    metrics = job.out / METRICS
    resources, use_gpu = job.config.resources, cluster.train_on_gpus()
    max_failures = 3 if resources.address else 0  # of a worker; on one machine the same error would only come again
    if options.precision == "bf16" and not use_gpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        print(f"d2c: {title}: this CPU only emulates bf16, which is many times slower than fp32: set precision=fp32", file=sys.stderr)
    with job.progress(options.num_images, done=_last(metrics).get("images", 0), title=title) as progress, _Watch(metrics, progress):
        checkpoint = _fit(spec.to_dict(), options, data, facts, job.out, workers, use_gpu, resources, max_failures)
    _export(job, checkpoint, spec, options, facts, text)


def _export(job: Job, checkpoint: Path, spec: TransformerSpec, options: TrainConfig, facts: dict[str, Any], text: Any) -> None:
    raw = state.weights(checkpoint, "model")
    ema = {**raw, **state.weights(checkpoint, "ema")}
    weights.save(
        job.out / MODEL, spec, {"ema": ema, "raw": raw},
        {
            "class_names": facts["class_names"], "labels": facts["labels"], "latent": facts["latent"], "image_size": job.config.data.image_size,
            "text_strength": options.text_strength, "ema_decay": options.ema_decay, "images": options.num_images, "fingerprint": job.fingerprint,
        },
        {"states": text[0].contiguous(), "mask": text[1].contiguous()} if text else None,
    )  # fmt: skip


def _fit(
    spec: dict[str, Any], train: TrainConfig, data: Path, facts: dict[str, Any], out: Path, workers: int, use_gpu: bool,
    resources: ResourcesConfig, max_failures: int,
) -> Path:  # fmt: skip
    """Trains to the end, from the last checkpoint under `out` if there is one.

    Returns:
        The folder of the last checkpoint's state.
    """
    mended = mend_checkpoints(out / "checkpoints")
    result = TorchTrainer(
        _worker,
        train_loop_config={
            "spec": spec,
            "train": asdict(train),
            "data": str(data),
            "columns": condensed.training_columns(facts, train.align_with if spec["vision_width"] else None),
            "cache_dir": resources.cache_dir,
            "keep_cache": resources.keep_cache,
            "metrics": str(out / METRICS),
            "threads": resources.threads,
            "mended": str(mended) if mended else "",
        },
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        run_config=RunConfig(
            # The same name and path find the checkpoints of an interrupted run.
            name="checkpoints",
            storage_path=str(out.absolute()),
            checkpoint_config=CheckpointConfig(num_to_keep=train.keep_checkpoints),
            failure_config=FailureConfig(max_failures=max_failures),
        ),
    ).fit()
    if result.checkpoint is None:
        raise RuntimeError(f"training under {out} ended without a checkpoint")
    return Path(result.checkpoint.path)


def _worker(args: dict[str, Any]) -> None:
    from d2c_ray.training import loop

    torch.set_num_threads(args["threads"])
    context = ray.train.get_context()
    rank, metrics = context.get_world_rank(), Path(args["metrics"])
    train = TrainConfig(**{**args["train"], "betas": tuple(args["train"]["betas"])})
    aligned = args["spec"]["vision_width"] > 0
    opened = condensed.open(args["data"], args["cache_dir"], args["columns"])
    data = opened.training_set(train.align_with if aligned else None)

    def log(values: dict[str, Any]) -> None:
        if rank == 0:
            with metrics.open("a") as file:
                file.write(json.dumps(values) + "\n")

    def run(resume: Path | None) -> None:
        if rank == 0:
            _forget_after(metrics, _images(resume))
        loop.train(
            TransformerSpec(**args["spec"]), train, data, device=ray.train.torch.get_device(), rank=rank,
            world_size=context.get_world_size(), resume=resume, log=log, checkpoint=_report,
        )  # fmt: skip

    try:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            run(Path(args["mended"]) if args["mended"] else None)
        else:
            with checkpoint.as_directory() as folder:
                run(Path(folder))
    finally:
        if context.get_local_rank() == 0 and not args["keep_cache"]:
            with suppress(UserError, OSError):  # which would hide how the training ended
                condensed.drop_cache(args["data"], args["cache_dir"])


def mend_checkpoints(folder: Path) -> Path | None:
    """Sets aside checkpoints whose index Ray was writing when it was killed, and finds the newest whole one among them.

    Ray does not write its index whole, and refuses to start on half of one.
    """
    index = folder / "checkpoint_manager_snapshot.json"
    try:
        json.loads(index.read_text())
        return None
    except FileNotFoundError:
        pass
    except json.JSONDecodeError:
        folder.rename(folder.with_name(f"{folder.name}-set-aside-{len(list(folder.parent.glob(folder.name + '-*')))}"))
    whole = []
    for state_file in folder.parent.glob(f"{folder.name}-set-aside-*/checkpoint_*/{state.META}"):
        with suppress(json.JSONDecodeError, SafetensorError, FileNotFoundError), safe_open(state_file.with_name(state.STATE), "pt"):
            whole.append((json.loads(state_file.read_text())["step"], state_file.parent))
    return max(whole)[1] if whole else None


def _report(step: int, save: Any) -> None:
    # report() is a barrier: every worker calls it, rank 0 brings the state.
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report({"step": step})
        return
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        ray.train.report({"step": step}, checkpoint=Checkpoint.from_directory(folder))


def _images(resume: Path | None) -> int:
    return json.loads((resume / "state.json").read_text())["images"] if resume is not None else 0


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


class _Watch:
    """Follows a metrics file, which the workers write, in a thread."""

    def __init__(self, metrics: Path, progress: Progress):
        self._metrics, self._progress = metrics, progress
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stop.wait(0.5):
            self._show()
        self._show()

    def _show(self) -> None:
        last = _last(self._metrics)
        if last:
            self._progress.at(last["images"], f"loss {last['loss']:.3f}")
        else:
            self._progress.at(self._progress.done, "starting")


def _last(metrics: Path) -> dict[str, Any]:
    with suppress(FileNotFoundError, IndexError, json.JSONDecodeError):
        return json.loads(metrics.read_text().splitlines()[-1])
    return {}
