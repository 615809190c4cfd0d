"""evaluate: what a student's images are worth, beside what real images and the subset itself would score; in every network."""

from pathlib import Path
from typing import Any

import numpy as np

from d2c_ray.config import INCEPTION, flattering
from d2c_ray.data import measured, provenance, reference_stats, tables
from d2c_ray.distributed import cluster, embed
from d2c_ray.evaluate.frechet import Statistics
from d2c_ray.evaluate.measures import measure
from d2c_ray.job import Job, Result
from d2c_ray.models import networks
from d2c_ray.rejects import Rejects
from d2c_ray.rundir import write_json

GENERATED = {"sample": "samples.parquet", "unguided": "unguided.parquet"}  # input: where its features go


def run(job: Job) -> Result:
    config = job.config
    condensed, reference = job.inputs["attach"].path, job.inputs["reference"].path / "features.parquet"
    ids = tables.read(reference, ["id"]).column("id").to_numpy()
    subset = tables.read(condensed / provenance.SELECTION, ["sample_id"]).column("sample_id").to_numpy()
    if config.select.selector == "all":  # the images that are measured anyway are a fair sample of all
        subset = subset[np.isin(subset, ids)]
    # Small datasets are in the reference whole, so that the subset's features are there already.
    known = bool(np.isin(subset, ids).all())
    generated: dict[str, Path | list[Path]] = {name: job.out / file for name, file in GENERATED.items() if name in job.inputs}
    total = config.sample.num_images * len(generated) + (0 if known else len(subset))
    share = cluster.share(config.resources, job.places)
    rejects = Rejects("evaluate", total, 0.0)
    with job.progress(total) as progress:
        for name in generated:
            parts = job.inputs[name].parts()
            if config.sample.keep == "none":  # its parts hold features in place of images
                generated[name] = parts
                progress.advance(config.sample.num_images)
            else:
                embed.embed_samples(config, parts, job.out / GENERATED[name], share, rejects, progress)
        if not known:
            embed.embed_rows(config, condensed / "rows.parquet", job.out / "subset.parquet", share, rejects, progress)
    found = {}
    given = networks.every(config.evaluate)  # by the names that the configuration has
    called = {own["network"]: name for name, own in given.items()}
    for network in called:
        for name, paths in generated.items():
            found[network, name] = _measure(job, network, paths, reference, subset, None if known else job.out / "subset.parquet")
    main, *others = called
    metrics: dict[str, Any] = {**found[main, "sample"], "record": _record(job, "sample", found[main, "sample"])}
    metrics["more"] = {
        network: {**found[network, "sample"], "network": given[called[network]], "notice": _notice(job, called[network])}
        for network in others
    }
    metrics["unguided"] = None
    if "unguided" in generated:
        own = found[main, "unguided"]
        metrics["unguided"] = {**own, "record": _record(job, "unguided", own)}
        for network, values in metrics["more"].items():
            values["unguided"] = found[network, "unguided"]
    metrics["notices"] = _notices(job, given) + _notes(main, found)
    write_json(job.out / "metrics.json", metrics)
    return Result(total, total, 0, metrics)


def _measure(
    job: Job, network: str, generated: Path | list[Path], reference: Path, subset: np.ndarray, subset_file: Path | None
) -> dict[str, Any]:
    """`measure` in one network. subset_file: where the subset's features are; None: among the reference's."""
    evaluate = job.config.evaluate
    real, made = measured.read(reference, network), measured.read(generated, network)
    kept = real if subset_file is None else measured.read(subset_file, network)
    chosen = np.isin(kept.ids, subset)
    held_out = np.isin(real.ids, job.facts("reference")["held_out_ids"])
    is_main = network == _main(job)["network"]
    return measure(
        reference=real.features[~held_out], reference_labels=real.labels[~held_out],
        held_out=real.features[held_out], held_out_labels=real.labels[held_out],
        held_out_probabilities=None if real.probabilities is None else real.probabilities[held_out],
        generated=made.features, asked=made.labels, probabilities=made.probabilities,
        subset=kept.features[chosen], subset_ids=kept.ids[chosen],
        statistics=_given(job) if is_main and evaluate.reference else None,
        neighbours=evaluate.neighbours, kid_subsets=evaluate.kid_subsets, kid_subset_size=evaluate.kid_subset_size,
        bootstrap=evaluate.bootstrap, pairs=evaluate.pairs, seed=evaluate.seed,
        # The probe says whether images show their class: once is enough, and it is slow.
        probe=is_main,
    )  # fmt: skip


def _given(job: Job) -> Statistics:
    """The statistics that distances are taken to in the main network, of evaluate.reference."""
    evaluate = job.config.evaluate
    return reference_stats.read("evaluate.reference", Path(evaluate.reference), _main(job)["width"], evaluate.network)


def _main(job: Job) -> dict[str, Any]:
    """What the main network is."""
    return networks.facts(job.config.evaluate.network, job.config.evaluate)


def _record(job: Job, generated: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """Everything that changes the numbers, and what is said beside them."""
    config, evaluate, reference = job.config, job.config.evaluate, job.facts("reference")
    network = _main(job)
    return {
        **job.facts(generated)["record"],
        "network": network["network"],
        "network_weights": network["weights"],
        "network_image_size": network["image_size"],
        "image_size": config.data.image_size,
        "generated": metrics["counts"]["generated"],
        "reference": reference["networks"][network["network"]]["images"],
        "reference_images": reference["reference_images"],
        "reference_statistics": reference_stats.content_hash(_given(job)) if evaluate.reference else None,
        "neighbours": evaluate.neighbours,
        "kid_subsets": evaluate.kid_subsets,
        "kid_subset_size": evaluate.kid_subset_size,
        "bootstrap": evaluate.bootstrap,
        "evaluate_seed": evaluate.seed,
        "seeds": 1,
    }


def _notice(job: Job, network: str) -> str | None:
    """Why distances in a further network flatter this student. The main network is refused for it."""
    why = flattering(job.config, network)
    return f"{network} is {why}: distances in its features flatter this student" if why else None


def _notes(main: str, found: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """What `measure` says of every network's numbers, each sentence once; whose it is where it is not the main one's."""
    said: dict[str, str] = {}
    for (network, _), values in found.items():
        for note in values["notes"]:
            said.setdefault(note, note if network == main else f"in {network}: {note}")
    return list(said.values())


def _notices(job: Job, given: dict[str, dict[str, Any]]) -> list[str]:
    evaluate = job.config.evaluate
    said = [notice for network in networks.names(evaluate)[1:] if (notice := _notice(job, network))]
    for network in given:
        if network == INCEPTION and given[network]["weights"] != networks.PUBLISHED[:16]:
            said.append(
                f"evaluate.inception={evaluate.inception} is not the network that clean-fid publishes: no number here compares with a published FID"
            )
    if evaluate.network == INCEPTION and evaluate.reference and reference_stats.of_adm(Path(evaluate.reference)):
        said.append(
            "the reference statistics are ADM's, made with TensorFlow's resize, and the images were resized by clean-fid: distances are close to, "
            "and not, what ADM's evaluator gives"
        )
    return said
