"""teacher: the model that judges difficulty, given or trained on all the data."""

from d2c_ray import job as jobs
from d2c_ray.config import in_training
from d2c_ray.distributed import attach, cluster, trainer
from d2c_ray.models import latents, teachers, weights
from d2c_ray.plan import checked_checkpoint
from d2c_ray.rejects import Rejects
from d2c_ray.rundir import SUCCESS, write_json

ROWS_PER_PART = 4096


def run(job: jobs.Job) -> jobs.Result:
    config, data = job.config, job.facts("manifest")
    if config.teacher.checkpoint:
        folder, known = checked_checkpoint(config)
        facts = {
            "kind": known.kind, "path": known.path, "trained_here": False, "source": known.source, "checkpoint": str(folder), "num_classes": known.num_classes,
            "class_map": teachers.class_map(data["class_names"], data["class_counts"], known, config.teacher.classes),
        }  # fmt: skip
        return jobs.Result(data["rows"], data["rows"], 0, facts)

    # Everything in the form the training loop reads, without attachments.
    whole = job.out / "data"
    whole.mkdir(parents=True, exist_ok=True)
    latent = latents.latent_facts(config)
    rejects = Rejects("teacher", data["rows"], config.data.max_rejected)
    if not (whole / SUCCESS).is_file():
        grid = latents.grid_side(latent, config.teacher.model)
        missing = [name for name in in_training(config) if name == "latent"]
        share = cluster.share(config.resources, job.places)
        with job.progress(data["rows"], title="teacher: read images") as progress:
            parts = attach.attach(
                config,
                {},
                job.inputs["manifest"].parts(),
                grid,
                whole,
                share,
                rejects,
                progress,
                ROWS_PER_PART,
                keep_images=False,
                online=missing,
            )
        facts = {
            "class_names": data["class_names"], "labels": [label for label, size in enumerate(data["class_counts"]) if size], "flip": config.data.flip, "latent": latent, "fingerprint": f"{job.fingerprint}-all", "in_training": missing,
            "rows": sum(part["rows"] for part in parts), "rejected": rejects.rows,
        }  # fmt: skip
        write_json(whole / SUCCESS, {"facts": facts})
    trainer.train(job, "teacher: train", config.teacher.model, config.teacher.train, whole, config.resources.teacher_workers)
    rejects.rows = trainer.condensed_facts(whole)["rejected"]
    rejects.write(job.out)
    done = trainer.condensed_facts(whole)["rows"]
    class_map = list(range(max(1, len(data["class_names"]))))
    spec = weights.read_meta(job.out / trainer.MODEL)["spec"]
    return jobs.Result(
        data["rows"],
        done,
        len(rejects.rows),
        {"kind": spec["kind"], "path": spec["path"], "trained_here": True, "metrics": "metrics.jsonl", "class_map": class_map},
    )
