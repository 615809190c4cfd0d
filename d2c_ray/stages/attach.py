"""attach: the condensed dataset, the chosen images with their text states, vision tokens and latents."""

import pyarrow as pa
import pyarrow.compute as pc
import torch

from d2c_ray.data import attached, condensed, tables
from d2c_ray.distributed import attach, cluster
from d2c_ray.distributed.score import LATENTS
from d2c_ray.errors import UserError
from d2c_ray.job import Job, Result
from d2c_ray.models import latents
from d2c_ray.models import text as text_encoders
from d2c_ray.rejects import Rejects

ROWS = "rows.parquet"


def run(job: Job) -> Result:
    config, names = job.config, job.facts("manifest")["class_names"]
    selected = tables.read(job.inputs["select"].parts(), ["sample_id"]).column("sample_id").combine_chunks()
    parts = [tables.read(path) for path in job.inputs["manifest"].parts()]
    rows = pa.concat_tables([part.filter(pc.is_in(part.column("sample_id"), selected)) for part in parts])
    tables.write(job.out / ROWS, rows, {}, config.attach.rows_per_part)

    text = config.attach.text
    prompts = [text_encoders.prompt(text.template, name) if text.encoder != "none" else "" for name in names]
    states = text_encoders.encode(text, prompts, torch.device("cpu")) if text.encoder != "none" else None
    attached.write_classes(job.out / condensed.CLASSES, names, prompts, states)

    latent = latents.latent_facts(config)
    kept = job.inputs["score"].path / LATENTS if "score" in job.inputs else None
    rejects = Rejects("attach", len(rows), 1.0)
    share = cluster.share(config.resources, job.places)
    with job.progress(len(rows)) as progress:
        facts = attach.attach(
            config,
            config.attach,
            [job.out / ROWS],
            latents.grid_side(latent, config.model),
            job.out,
            share,
            rejects,
            progress,
            True,
            kept if kept and kept.is_dir() else None,
        )
    rejects.write(job.out)
    if rejects.rows:
        row = rejects.rows[0]
        raise UserError(
            f"attach: {len(rejects.rows)} chosen images can no longer be read, the first {row['key']}: {row['reason']}. They were readable when they were scored; has the source changed?"
        )
    cosines = [part["vision_cosine_min"] for part in facts if part["vision_cosine_min"] is not None]
    return Result(
        len(rows), sum(part["rows"] for part in facts), 0,
        {
            "class_names": names, "labels": sorted({max(0, label) for label in rows.column("label").to_pylist()}), "flip": config.data.flip, "latent": latent, "fingerprint": job.fingerprint,
            "text_encoder": text.encoder, "vision_encoder": config.attach.vision.encoder, "vision_cosine_min": min(cosines) if cosines else None,
            "bytes": sum(path.stat().st_size for path in job.out.glob("part-*.parquet")),
        },
    )  # fmt: skip
