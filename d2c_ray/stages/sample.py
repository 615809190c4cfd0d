"""sample: images of a trained student."""

from pathlib import Path
from typing import Any

from d2c_ray.config import Config, SampleConfig
from d2c_ray.data import generated, tables
from d2c_ray.distributed import cluster, pool, trainer
from d2c_ray.distributed.actors import Sampler
from d2c_ray.evaluate import sampling
from d2c_ray.job import Job, Result
from d2c_ray.models import latents, networks, weights
from d2c_ray.models.transformer import TransformerSpec
from d2c_ray.rundir import StageDir

UNIT_BATCHES = 2  # device batches a part


def run(job: Job) -> Result:
    config, trained = job.config, job.facts("train")
    model = job.inputs["train"].path / trainer.MODEL
    sample = config.sample
    share = cluster.share(config.resources, job.places)
    generated.clean(job.out)
    batch = sampling.forward_batch(sample, share.device)
    per_unit = batch * max(1, UNIT_BATCHES * sample.device_batch // batch)  # a batch that is filled up is work for nothing
    parts = [
        {"unit": index, "start": start, "stop": min(start + per_unit, sample.num_images)}
        for index, start in enumerate(range(0, sample.num_images, per_unit))
    ]
    work = [unit for unit in parts if not _there(job.out / f"part-{unit['unit']:06d}.parquet", unit)]
    finished = sum(unit["stop"] - unit["start"] for unit in parts if unit not in work)
    actor_args = {
        "model": str(model),
        "out": str(job.out),
        "sample": sample,
        "vae": config.vae,
        "evaluate": config.evaluate,
        "networks": _measured_in(config) if sample.keep == "none" else {},
        "device": share.device,
        "threads": share.threads,
    }
    with job.progress(sample.num_images, done=finished) as progress:
        for _, result in pool.run_pool(Sampler, actor_args, work, share):
            progress.advance(result["rows"])
            finished += result["rows"]
    _keep(job, sample)
    spec = TransformerSpec(**weights.read_meta(model)["spec"])
    record = {
        **sampling.facts(sample, spec), "weights": sample.weights, "ema_decay": weights.decay(sample.weights, trained["ema_decay"]),
        "vae_decoder": latents.latent_facts(config).get("vae"), "train_images": trained["images"],
    }  # fmt: skip
    return Result(sample.num_images, finished, 0, {"record": record})


def _there(part: Path, unit: dict[str, Any]) -> bool:
    """Whether a part is there, whole, and holds these images: on other hardware units are cut otherwise."""
    return part.is_file() and tables.is_whole(part) and tables.metadata(part)["unit"] == unit


def _measured_in(config: Config) -> dict[str, str]:
    """The networks that measure, with the hashes of their weights."""
    return {name: own["weights"] for name, own in networks.every(config.evaluate).items()}


def _keep(job: Job, sample: SampleConfig) -> None:
    """The other forms that images are kept in, of the parts."""
    if sample.keep not in ("png", "npz"):
        return
    parts, title = StageDir(job.out).parts(), f"{job.title}: write {sample.keep}"
    with job.progress(sample.num_images, title=title) as progress:
        if sample.keep == "png":
            generated.write_pngs(parts, job.out, progress.advance)
        else:
            generated.write_npz(parts, job.out / generated.NPZ, sample.num_images, progress.advance)
