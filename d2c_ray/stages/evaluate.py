"""evaluate: what a student's images are worth, beside what real images and the subset itself would score; in every network."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from d2c_ray.config import INCEPTION, flattering
from d2c_ray.data import measured, provenance, reference_stats, tables
from d2c_ray.distributed import cluster, embed
from d2c_ray.evaluate import frechet
from d2c_ray.evaluate.measures import Whole, measurable, measure
from d2c_ray.evaluate.probe import Probe
from d2c_ray.evaluate.rows import drawn
from d2c_ray.job import Job, Result
from d2c_ray.models import networks
from d2c_ray.rejects import Rejects
from d2c_ray.rundir import StageDir, write_json

GENERATED = {"sample": "samples", "unguided": "unguided"}  # input: folder of its features
MOST_REFERENCE = 50_000  # rows of the reference that are held, for what looks at single ones; as many as were generated, if those are more
MOST_TRAINING = 100_000  # training images that copies are sought among


@dataclass(frozen=True)
class Images:
    """Which real images are measured, by sample_id, ascending.

    Attributes:
        parts: the features of the reference's and the held-out images.
        count: images in the reference. labels: of each of them. reference: those whose features are held.
        training: how many images were trained on. trained: those of them that are measured. sought: those that copies are sought among.
        known: whether the training images' features are among `parts`.
    """

    parts: list[Path]
    count: int
    labels: np.ndarray
    reference: np.ndarray
    held_out: np.ndarray
    training: int
    trained: np.ndarray
    sought: np.ndarray
    known: bool


def run(job: Job) -> Result:
    config, images = job.config, _images(job)
    generated = {name: StageDir(job.out / folder) for name, folder in GENERATED.items() if name in job.inputs}
    work: list[dict[str, Any]] = []
    total = config.sample.num_images * len(generated)
    for name, features in generated.items():
        if config.sample.keep == "none":  # its parts hold features in place of images
            generated[name] = job.inputs[name]
        else:
            work += embed.of_samples(job.inputs[name].parts(), features.path)
    subset, mirrored = StageDir(job.out / "subset"), StageDir(job.out / "mirrored")
    if not images.known:
        work += embed.of_rows(_rows(job, images.trained, "subset"), subset.path)
        total += len(images.trained)
    if config.data.flip:  # a student has seen the mirror images as often
        work += embed.of_rows(_rows(job, images.sought, "mirrored"), mirrored.path, mirrored=True)
        total += len(images.sought)
    with job.progress(total) as progress:
        if config.sample.keep == "none":
            progress.advance(config.sample.num_images * len(generated))
        embed.embed_images(config, work, cluster.share(config.resources, job.places), Rejects("evaluate", total, 0.0), progress)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    given = networks.every(config.evaluate)  # by the names that the configuration has
    called = {own["network"]: name for name, own in given.items()}
    for network in called:
        # One by one, so that not all networks' features are in memory.
        for name, values in _measure(job, network, generated, images, subset.parts(), mirrored.parts()).items():
            found[network, name] = values
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
    metrics["notices"] = _notices(job, given, images) + _notes(main, found)
    write_json(job.out / "metrics.json", metrics)
    return Result(total, total, 0, metrics)


def _images(job: Job) -> Images:
    parts = StageDir(job.inputs["reference"].path / measured.FEATURES).parts()
    ids, labels = measured.listed(parts)
    held_out = np.isin(ids, job.facts("reference")["held_out_ids"])
    trained = np.sort(tables.read(job.inputs["attach"].path / provenance.SELECTION, ["sample_id"]).column("sample_id").to_numpy())
    training = len(trained)
    if job.config.select.selector == "all":  # the images that are measured anyway are a fair sample of all
        trained = trained[np.isin(trained, ids)]
    reference = ids[~held_out]
    return Images(
        parts, len(reference), labels[~held_out], reference[drawn(len(reference), max(MOST_REFERENCE, job.config.sample.num_images))],
        ids[held_out], training, trained, trained[drawn(len(trained), MOST_TRAINING)],
        bool(np.isin(trained, ids).all()),  # small datasets are in the reference whole
    )  # fmt: skip


def _rows(job: Job, ids: np.ndarray, name: str) -> Path:
    """A file of some training images' manifest rows."""
    source = job.inputs["reference" if job.config.select.selector == "all" else "attach"].path / "rows.parquet"
    rows = tables.read(source)
    out = job.out / f"{name}-rows.parquet"
    tables.write(out, rows.filter(pc.is_in(rows.column("sample_id"), pa.array(ids))), {}, embed.ROWS_PER_GROUP)
    return out


def _measure(
    job: Job, network: str, generated: dict[str, StageDir], images: Images, subset: list[Path], mirrored: list[Path]
) -> dict[str, dict[str, Any]]:
    """`measure` of every sampling in one network. The real images are read once for all of them.

    Args:
        subset: the training images' features, where they are not among the reference's. mirrored: of their mirror images.
    """
    evaluate, facts = job.config.evaluate, job.facts("reference")["networks"][network]
    is_main = network == _main(job)["network"]
    made = {name: measured.read(folder.parts(), network) for name, folder in generated.items()}
    reference, held_out, trained, turned = (
        measured.Picked(ids) for ids in (images.reference, images.held_out, images.sought, images.sought)
    )
    asked = next(iter(made.values())).labels  # of every sampling the same
    given = _given(job) if is_main and evaluate.reference else None
    classes = {} if given else {label: frechet.Moments(facts["width"]) for label in measurable(images.labels, asked, facts["width"])}
    floor = frechet.Moments(facts["width"]) if len(images.sought) < len(images.trained) else None
    for block in measured.blocks(images.parts, network):
        reference.take(block)
        held_out.take(block)
        outside = ~np.isin(block.ids, images.held_out)
        for label, moments in classes.items():
            moments.update(block.features[outside & (block.labels == label)])
        if images.known:
            _take(block, images, trained, floor)
    for block in measured.blocks(subset, network):
        _take(block, images, trained, floor)
    for block in measured.blocks(mirrored, network):
        turned.take(block)
    real, held, kept = reference.rows(), held_out.rows(), trained.rows()
    whole = Whole(images.count, _statistics(job, facts, real.features), {label: moments.statistics() for label, moments in classes.items()})
    # The probe says whether images show their class: once is enough, and it is slow.
    probe = Probe.fit(real.features, real.labels) if is_main else None
    return {
        name: measure(
            reference=real.features, reference_labels=real.labels, whole=whole,
            held_out=held.features, held_out_labels=held.labels, held_out_probabilities=held.probabilities,
            generated=own.features, asked=own.labels, probabilities=own.probabilities,
            subset=kept.features, subset_ids=kept.ids, mirrored=turned.rows().features if mirrored else None,
            subset_whole=Whole(floor.count, floor.statistics()) if floor else None, statistics=given,
            neighbours=evaluate.neighbours, kid_subsets=evaluate.kid_subsets, kid_subset_size=evaluate.kid_subset_size,
            bootstrap=evaluate.bootstrap, pairs=evaluate.pairs, seed=evaluate.seed, probe=probe,
        )
        for name, own in made.items()
    }  # fmt: skip


def _take(block: measured.Measured, images: Images, trained: measured.Picked, floor: frechet.Moments | None) -> None:
    """Takes up the training images of a block: those that copies are sought among, and all of them into the floor's statistics."""
    trained.take(block)
    if floor is not None:
        floor.update(block.features[np.isin(block.ids, images.trained)])


def _statistics(job: Job, facts: dict[str, Any], held: np.ndarray) -> frechet.Statistics:
    """Statistics of all the reference, as its stage has left them; of so few images that are all held a factor is exact and thin."""
    if facts["images"] == len(held) <= facts["width"] or not facts["statistics"]:
        return frechet.statistics(held)
    file = job.inputs["reference"].path / facts["statistics"]
    return reference_stats.read("reference", file, facts["width"], facts["network"])


def _given(job: Job) -> frechet.Statistics:
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
        "vae_precision": config.vae.precision if config.vae.path else None,
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
        "probe_rows": metrics["probe_rows"],
        "reference_rows": metrics["generated"]["kid_count"],
        "copying_orientations": (metrics["copying"] or {}).get("orientations"),
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


def _notices(job: Job, given: dict[str, dict[str, Any]], images: Images) -> list[str]:
    evaluate = job.config.evaluate
    said = [notice for network in networks.names(evaluate)[1:] if (notice := _notice(job, network))]
    for network in given:
        if network == INCEPTION and given[network]["weights"] != networks.PUBLISHED[:16]:
            said.append(
                f"evaluate.inception={evaluate.inception} is not the network that clean-fid publishes: no number here compares with a published FID"
            )
    if job.config.select.selector == "all":
        some, every = f"{len(images.trained):,}", f"{images.training:,}"
        said.append(
            f"select.selector=all: the floor is of {some} of its {every} training images, the reference among them, and near 0 by that alone"
        )
        if some != every:
            said.append(
                f"select.selector=all: copies are sought among {len(images.sought):,} training images that are measured, and not among all {every}"
            )
    if evaluate.network == INCEPTION and evaluate.reference and reference_stats.of_adm(Path(evaluate.reference)):
        said.append(
            "the reference statistics are ADM's, made with TensorFlow's resize, and the images were resized by clean-fid: distances are close to, "
            "and not, what ADM's evaluator gives"
        )
    return said
