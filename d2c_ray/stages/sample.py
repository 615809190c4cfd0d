"""sample: images of a trained student."""

from d2c_ray.distributed import cluster, pool, trainer
from d2c_ray.distributed.actors import Sampler
from d2c_ray.evaluate import sampling
from d2c_ray.job import Job, Result
from d2c_ray.models import latents, weights

UNIT_BATCHES = 2  # device batches a part


def run(job: Job) -> Result:
    config, trained = job.config, job.facts("train")
    model = job.inputs["train"].path / trainer.MODEL
    sample = config.sample
    share = cluster.share(config.resources, job.places)
    per_unit = sample.device_batch * UNIT_BATCHES
    parts = [
        {"unit": index, "start": start, "stop": min(start + per_unit, sample.num_images)}
        for index, start in enumerate(range(0, sample.num_images, per_unit))
    ]
    work = [unit for unit in parts if not (job.out / f"part-{unit['unit']:06d}.parquet").is_file()]
    finished = sum(unit["stop"] - unit["start"] for unit in parts if unit not in work)
    actor_args = {
        "model": str(model),
        "out": str(job.out),
        "sample": sample,
        "vae": config.vae,
        "device": share.device,
        "threads": share.threads,
    }
    with job.progress(sample.num_images, done=finished) as progress:
        for _, result in pool.run_pool(Sampler, actor_args, work, share):
            progress.advance(result["rows"])
            finished += result["rows"]
    spec = weights.read_meta(model)["spec"]
    record = {
        "sampler": sampling.sampler_name(sample, spec["kind"]), "steps": sample.steps, "guidance": sample.guidance, "guidance_interval": None,
        "weights": sample.weights, "ema_decay": trained["ema_decay"], "vae_decoder": latents.latent_facts(config).get("vae"), "class_draw": sample.class_draw,
        "sample_seed": sample.seed, "sample_precision": sample.precision, "train_images": trained["images"],
    }  # fmt: skip
    return Result(sample.num_images, finished, 0, {"record": record})
