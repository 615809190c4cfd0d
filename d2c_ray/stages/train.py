"""train: a student on the condensed dataset."""

from d2c_ray.distributed import trainer
from d2c_ray.job import Job, Result


def run(job: Job) -> Result:
    config = job.config
    rows = job.inputs["attach"].success()["rows_done"]
    shown = trainer.train(job, job.title, config.model, config.train, job.inputs["attach"].path, config.resources.train_workers)
    return Result(rows, rows, 0, {"metrics": "metrics.jsonl", "images": shown, "ema_decay": config.train.ema_decay})
