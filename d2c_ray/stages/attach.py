"""attach: the condensed dataset, the chosen images with their text states, vision tokens and latents."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from d2c_ray import logs, rundir
from d2c_ray.config import encoder_key, in_training
from d2c_ray.data import attached, condensed, provenance, slices, storage, tables, whole
from d2c_ray.distributed import attach, cluster
from d2c_ray.distributed.score import LATENTS
from d2c_ray.errors import UserError
from d2c_ray.job import Job, Result
from d2c_ray.models import latents, text, vision
from d2c_ray.plan import STAGES
from d2c_ray.rejects import Rejects
from d2c_ray.report import card
from d2c_ray.rundir import StageDir, versions
from d2c_ray.selection.baselines import NEEDS_SCORES

ROWS = "rows.parquet"


def run(job: Job) -> Result:
    config, options, names = job.config, job.config.attach, job.facts("manifest")["class_names"]
    share = cluster.share(config.resources, job.places)
    everything, online = config.select.selector == "all", in_training(config)
    files, count = (job.inputs["manifest"].parts(), job.facts("manifest")["rows"]) if everything else _selection(job)
    larger = None if everything else _larger(job)
    if larger is not None and not (job.out / condensed.CLASSES).is_file():
        with rundir.whole(job.out / condensed.CLASSES) as temporary:
            shutil.copyfile(larger.path / condensed.CLASSES, temporary)
    write_classes = _classes(job, names, share)

    latent = latents.latent_facts(config)
    grid = latents.grid_side(latent, config.model)
    for stale in job.out.glob(".*"):  # what a killed process was writing
        stale.unlink(missing_ok=True)
    rejects = Rejects("attach", count, config.data.max_rejected if everything else 1.0)
    with job.progress(count) as progress:
        if larger is not None:
            parts = slices.take(larger.parts(), files, job.out, options.rows_per_part, progress.advance)
        else:
            parts = attach.attach(
                config, options.encoders(), files, grid, job.out, share, rejects, progress, options.rows_per_part,
                keep_images=True, latents=_kept(job), class_names=names, online=online, all_readable=not everything,
            )  # fmt: skip
    write_classes()
    rejects.write(job.out)
    shutil.rmtree(job.out / "loading", ignore_errors=True)
    if rejects.rows and not everything:
        row = rejects.rows[0]
        raise UserError(
            f"attach: {len(rejects.rows)} chosen images can no longer be read, the first {row['key']}: {row['reason']}. They were readable when they were scored; has the source changed?"
        )
    shown = {
        column: {
            **vision.facts(own, grid, encoder_key(column)),
            "storage": parts[0]["storage"][column],
            "cosine_min": _least(parts, column),
        }
        for column, own in options.encoders().items()
        if column not in online
    }
    done = sum(part["rows"] for part in parts)
    chosen = _decoded(job) if everything else tables.read(job.out / provenance.SELECTION, ["label"])
    selection = job.facts("select") | ({"images": done, "share": done / count} if everything else {})
    # What the larger dataset cost an image, this one's images would have cost on their own.
    part = count / larger.success()["rows_done"] if larger is not None else 0.0
    elsewhere = larger.success()["seconds"] * part if larger is not None else 0.0
    told = provenance.write(
        job.out, fingerprint=job.fingerprint, rows=done, class_names=names,
        data={"source": config.data.source, "path": _source(config.data.path), "image_size": config.data.image_size, "channels": config.data.channels},
        flip=config.data.flip, latent=latent, vae=_vae(job), grid=grid, text=text.facts(options.text) if options.text.encoder != "none" else None,
        vision=shown, in_training=online, selection=selection, cost_seconds=_costs(job, elsewhere), versions=versions(),
    )  # fmt: skip
    card.write(job.out, told)
    return Result(
        count, done, len(rejects.rows),
        {
            "class_names": names, "labels": np.unique(np.maximum(chosen.column("label").to_numpy(), 0)).tolist(), "flip": config.data.flip, "latent": latent, "fingerprint": job.fingerprint,
            "in_training": online, "text_encoder": options.text.encoder, "vision": shown, "bytes": sum(path.stat().st_size for path in job.out.glob("part-*.parquet")),
            **({"taken_from": larger.path.name} if larger is not None else {}),
        },
        elsewhere,
        rundir.place_seconds(larger.success()) * part if larger is not None else 0.0,
    )  # fmt: skip


def _selection(job: Job) -> tuple[list[Path], int]:
    """Writes the chosen images' manifest rows, and what the selection says of them; gives the file of the rows and their number."""
    chosen = tables.read(job.inputs["select"].parts()).sort_by("sample_id")
    rows = tables.rows_of(job.inputs["manifest"].parts(), chosen.column("sample_id").to_numpy())
    tables.write(job.out / ROWS, rows, {}, job.config.attach.rows_per_part)
    tables.write(job.out / provenance.SELECTION, chosen, job.facts("select"))
    return [job.out / ROWS], len(rows)


def _larger(job: Job) -> StageDir | None:
    """The smallest finished dataset of this run that has the chosen images, with the same attachments, stored as theirs would be."""
    chosen = tables.read(job.out / provenance.SELECTION, ["sample_id"]).column("sample_id")
    auto = {column for column, own in job.config.attach.encoders().items() if own.storage == "auto"}
    found: list[tuple[int, str, StageDir]] = []
    for folder in job.relatives():
        if any(facts["storage"] == "bf16" for column, facts in folder.success()["facts"]["vision"].items() if column in auto):
            continue  # one of its other images may have needed that
        kept = tables.read(folder.path / provenance.SELECTION, ["sample_id"]).column("sample_id").combine_chunks()
        if pc.all(pc.is_in(chosen, kept)).as_py():
            found.append((len(kept), folder.path.name, folder))
    return min(found)[2] if found else None


def _decoded(job: Job) -> pa.Table:
    """Writes the selection of all images that could be decoded, and gives it."""
    chosen = tables.read(job.inputs["select"].parts())
    kept = tables.read(sorted(job.out.glob("part-*.parquet")), ["sample_id"]).column("sample_id")
    if len(kept) < len(chosen):
        chosen = whole.selection(chosen.filter(pc.is_in(chosen.column("sample_id"), kept.combine_chunks())))
    tables.write(job.out / provenance.SELECTION, chosen, job.facts("select"))
    return chosen


def _classes(job: Job, names: list[str], share: cluster.Share) -> Callable[[], None]:
    """Begins the class table, once; gives a function that waits for the text states and writes it."""
    out, options = job.out / condensed.CLASSES, job.config.attach.text
    if out.is_file():
        return lambda: None
    if options.encoder == "none":
        return lambda: attached.write_classes(out, names, [""] * len(names), None)
    prompts = [text.prompt(options.template, name) for name in names]
    encoded = attach.start_text(options, prompts, share)

    def finish() -> None:
        states, mask, cut = encoded()
        attached.write_classes(out, names, prompts, (states, mask))
        if cut:
            words = f"{len(cut)} prompts are longer than attach.text.tokens={options.tokens} and were cut, the first: {cut[0]!r}"
            logs.say(f"attach: {words}", "warning")

    return finish


def _kept(job: Job) -> tuple[Path, str] | None:
    """Where scoring kept latents, and on what it made them."""
    folder = job.inputs["score"].path / LATENTS if "score" in job.inputs else None
    return (folder, tables.metadata(job.inputs["score"].parts()[0])["device"]) if folder and folder.is_dir() else None


def _source(path: str) -> str:
    """Where the images came from; of a disk of the maker's the last part alone, since the record is to be shared."""
    return path if storage.is_remote(path) else Path(path).name


def _least(parts: list[dict[str, Any]], column: str) -> float | None:
    return min((part["cosine"][column] for part in parts if part["cosine"][column] is not None), default=None)


def _vae(job: Job) -> dict[str, Any] | None:
    vae = job.config.vae
    return (
        {"path": vae.path, "subfolder": vae.subfolder, "precision": vae.precision, "device_batch": vae.device_batch} if vae.path else None
    )


def _costs(job: Job, elsewhere: float) -> dict[str, float]:
    """Seconds of every stage that this dataset would have needed on its own, and of this one so far.

    Args:
        elsewhere: seconds that were spent for it in the folder of a larger dataset.
    """
    free = () if job.config.select.selector in NEEDS_SCORES else ("teacher", "score")
    found: dict[str, float] = {}
    waiting = list(job.inputs.items())
    while waiting:
        stage, folder = waiting.pop()
        if stage in free or stage in found:
            continue
        record = folder.success()
        found[stage] = record["seconds"]
        waiting += [(name, StageDir(folder.path.parent / given)) for name, given in record["inputs"].items()]
    ordered = {stage: found[stage] for stage in STAGES if stage in found}
    return {**ordered, "attach": round(job.seconds_before + time.monotonic() - job.started + elsewhere, 2)}
