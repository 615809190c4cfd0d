"""train: a student on the condensed dataset."""

import math

from d2c_ray.distributed import checkpoints, trainer
from d2c_ray.job import Job, Result
from d2c_ray.rundir import StageDir, place_seconds


def run(job: Job) -> Result:
    config = job.config
    rows = job.inputs["attach"].success()["rows_done"]
    shorter = _shorter(job)
    data = job.inputs["attach"].path
    workers = config.resources.train_workers
    shown = trainer.train(job, job.title, config.model, config.train, data, workers, shorter.path if shorter else None)
    facts = {"metrics": "metrics.jsonl", "images": shown, "ema_decay": config.train.ema_decay}
    if shorter is None:
        return Result(rows, rows, 0, facts)
    before = shorter.success()
    facts["after"] = {"folder": shorter.path.name, "images": before["facts"]["images"]}
    return Result(rows, rows, 0, facts, before["seconds"], place_seconds(before))


def _shorter(job: Job) -> StageDir | None:
    """The longest finished training of this run that did the same for fewer steps: what a step does depends on its number alone."""
    train, resources = job.config.train, job.config.resources

    def steps(images: int) -> int:
        return math.ceil(images / train.batch_size)

    found: list[tuple[int, StageDir]] = []
    for folder in job.relatives():
        images = folder.success()["facts"]["images"]
        place = checkpoints.place(checkpoints.where(resources.checkpoint_storage, folder.path), job.config.storage)
        if 0 < steps(images) < steps(train.num_images) and checkpoints.newest(place):
            found.append((images, folder))
    return max(found, key=lambda one: one[0])[1] if found else None
