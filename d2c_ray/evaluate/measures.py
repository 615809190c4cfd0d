"""The measures of one student, each beside its floor and what real images score at the same counts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from d2c_ray.evaluate import bootstrap as resampling
from d2c_ray.evaluate.copying import copying
from d2c_ray.evaluate.frechet import Statistics, frechet_distance
from d2c_ray.evaluate.frechet import statistics as statistics_of
from d2c_ray.evaluate.inception_score import inception_score
from d2c_ray.evaluate.kid import kid
from d2c_ray.evaluate.precision_recall import overlap
from d2c_ray.evaluate.probe import Probe
from d2c_ray.evaluate.rows import drawn, shuffled


@dataclass(frozen=True, eq=False)
class Whole:
    """A set of images of which not all features are held.

    Attributes:
        count, statistics: of all of them. classes: statistics by label, of those classes that have more images than the
            features are wide.
    """

    count: int
    statistics: Statistics
    classes: Mapping[int, Statistics] = field(default_factory=dict)


def measure(
    *, reference: np.ndarray | None, reference_labels: np.ndarray | None, held_out: np.ndarray | None, held_out_labels: np.ndarray | None,
    generated: np.ndarray, asked: np.ndarray | None, subset: np.ndarray | None, neighbours: int, statistics: Statistics | None = None,
    subset_ids: np.ndarray | None = None, mirrored: np.ndarray | None = None, probabilities: np.ndarray | None = None, held_out_probabilities: np.ndarray | None = None,
    kid_subsets: int = 100, kid_subset_size: int = 1000, bootstrap: int = 0, pairs: int = 16, seed: int = 0, probe: bool | Probe | None = True,
    whole: Whole | None = None, subset_whole: Whole | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measures generated images, held-out real ones and the subset against one reference.

    Args:
        reference, held_out: features of disjoint real images. generated, asked: features and the classes asked for.
        subset: features of the images the student was trained on, subset_ids: what those are called (else their rows).
        mirrored: of their mirror images, where it has seen these too; for copying alone.
        statistics: Fréchet distances are to these, and of all generated images; without them they are to the
            reference, and of as many generated images as there are held-out ones.
        whole, subset_whole: what `reference` and `subset` are some rows of, where not all are held. Fréchet distances are of
            these, and what looks at single rows (KID, precision to coverage, the probe, copying) looks at the rows.
        probabilities, held_out_probabilities: class probabilities a row, of a network that gives them.
        kid_subsets, kid_subset_size: as of `kid`. bootstrap: resamplings behind the intervals, 0 for none.
        pairs: generated images next to a training image that are listed. probe: one for label_agreement, or whether to fit it.
        Whatever may be None leaves what needs it None.

    Returns:
        counts: generated, sampled, real, subset, reference, width. Generated and real are what is compared with each other:
        without `statistics` equally many, each drawn from all by one fixed permutation, since rows may come class by class;
        sampled is how many generated images there are. The subset has its own count, which is what a model that copies it
        would draw from.
        For each of generated, real and subset: frechet, frechet_interval (95 %; not of the subset, which is no draw), kid,
        kid_error (standard error), kid_count (rows of the reference it draws from), precision, recall, density, coverage, precision_recall_count (of either side),
        inception_score, inception_score_error (standard deviation over ten parts in a fixed shuffled order).
        Without held-out images real is as many of the reference against the rest of it, where images are too few for the
        features' width and the reference is twice as many; else nothing.
        Of all generated images, since nothing there asks for equal counts:
        per_class: {label: Fréchet distance} of the classes with more images than the features are wide, both generated
        and in the reference, which is what it takes for covariances of full rank; None without such a class, or with
        `statistics`, which have no classes.
        copying: as `copying` gives it. label_agreement, probe_accuracy: shares of generated images whose probed class is the one
        asked, and of held-out ones whose is their own. probe_rows: real images the probe was fitted on.
        at_equal_counts: with `statistics` and fewer held-out images than generated ones count, and the Fréchet distances of so
        many of either (generated, real); else None.
        too_few: a sentence where there are too few images for the features' width. notes: sentences on what was measured.
    """
    fewest = len(generated) if held_out is None else min(len(generated), len(held_out))
    count = fewest if statistics is None else len(generated)
    against = statistics or (whole.statistics if whole else None)
    if against is None and reference is not None and len(reference) > 1:
        against = statistics_of(reference)
    some = drawn(len(generated), count)
    sets = {
        "generated": (generated[some], None if probabilities is None else probabilities[some], bootstrap),
        "real": _real(held_out, held_out_probabilities, fewest, bootstrap),
        "subset": (subset, None, 0),
    }
    found: dict[str, Any] = {"counts": {name: 0 if features is None else len(features) for name, (features, _, _) in sets.items()}}
    found["counts"] |= {
        "sampled": len(generated), "reference": _reference_count(reference, whole, statistics), "width": int(generated.shape[1]),
    }  # fmt: skip
    if subset_whole:
        found["counts"]["subset"] = subset_whole.count
    for name, (features, classes, resamples) in sets.items():
        found[name] = {
            **_frechet(features, against, resamples, seed, subset_whole if name == "subset" else None),
            **_kernel(reference, features, kid_subsets, kid_subset_size, seed),
            **_overlap(reference, features, neighbours),
            **_inception_score(classes),
        }
    found["notes"] = []
    if count < len(generated):
        found["notes"].append(f"measured {count:,} of {len(generated):,} generated images: so many real images are held out")
    found["at_equal_counts"] = None
    if statistics is not None and held_out is not None and 1 < fewest < count:
        fair = frechet_distance(statistics_of(generated[drawn(len(generated), fewest)]), statistics)
        found["at_equal_counts"] = {"count": fewest, "generated": fair, "real": found["real"]["frechet"]}
        found["notes"].append(
            f"{count:,} generated images and {fewest:,} held-out real ones are measured, and fewer images score higher: at {fewest:,} each the "
            f"Fréchet distance is {fair:.4g} of generated images and {found['real']['frechet']:.4g} of real ones"
        )
    if whole and reference is not None and len(reference) < whole.count:
        found["notes"].append(
            f"KID, precision, recall, density, coverage and the label probe look at {len(reference):,} of the {whole.count:,} reference images, "
            "drawn once; Fréchet distances at all"
        )
    rest = None  # of the reference, where the real images are a part of it
    if held_out is None and statistics is None and reference is not None and 1 < count <= len(reference) // 2 and _are_few(found["counts"]):
        taken = np.zeros(len(reference), bool)
        taken[drawn(len(reference), count)] = True
        real, others = reference[taken], reference[~taken]
        rest = len(others)
        found["counts"]["real"] = count
        found["real"] |= {
            **_frechet(real, statistics_of(others), bootstrap, seed),
            **_kernel(others, real, kid_subsets, kid_subset_size, seed),
            **_overlap(others, real, neighbours),
        }
        found["notes"].append(
            f"no real images are held out: the real ones shown are {count:,} of the reference, measured against its other {rest:,}"
        )
    found["per_class"] = None
    if statistics is None and asked is not None and (whole or (reference is not None and reference_labels is not None)):
        by_class = whole.classes if whole else class_statistics(reference, reference_labels, asked)  # type: ignore[arg-type]
        found["per_class"] = per_class(by_class, generated, asked)
    found["copying"] = copying(generated, held_out, subset, pairs, subset_ids, mirrored) if subset is not None and len(subset) else None
    found["notes"] += _of_copying(found["copying"], subset_whole)
    floor = _floor(found["counts"], found["real"]["frechet"], rest, held_out is not None, statistics is not None)
    found["too_few"] = too_few(found["counts"], floor)
    found["label_agreement"] = found["probe_accuracy"] = found["probe_rows"] = None
    if reference is None or reference_labels is None or held_out is None or held_out_labels is None or asked is None:
        return found
    if probe is True:
        probe = Probe.fit(reference, reference_labels)
    if isinstance(probe, Probe):
        found["label_agreement"], found["probe_accuracy"] = probe.accuracy(generated, asked), probe.accuracy(held_out, held_out_labels)
        found["probe_rows"] = probe.rows
    return found


def class_statistics(reference: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> dict[int, Statistics]:
    """Statistics of each class that a distance by class can be taken to, as `measurable` has them."""
    return {label: statistics_of(reference[labels == label]) for label in measurable(labels, asked, reference.shape[1])}


def measurable(labels: np.ndarray, asked: np.ndarray, width: int) -> list[int]:
    """The classes that have more images than the features are wide on both sides."""
    enough = [set(found[counts > width].tolist()) for found, counts in (np.unique(side, return_counts=True) for side in (labels, asked))]
    return sorted(enough[0] & enough[1])


def per_class(classes: Mapping[int, Statistics], generated: np.ndarray, asked: np.ndarray) -> dict[str, float] | None:
    """Fréchet distance to each class of which more images were generated than the features are wide; None without any."""
    distances = {}
    for label, real in classes.items():
        made = asked == label
        if made.sum() > generated.shape[1]:
            distances[str(label)] = frechet_distance(statistics_of(generated[made]), real)
    return distances or None


def _of_copying(found: dict[str, Any] | None, whole: Whole | None) -> list[str]:
    """What must be known to read the copying measure."""
    said = []
    if found and whole and found["training"] < whole.count:
        said.append(f"copies are sought among {found['training']:,} of the {whole.count:,} training images, drawn once")
    if found and found["real_duplicates"] and not found["real"]:
        said.append("every held-out real image is a training image as well: how near new ones come to those is not known")
    return said


def too_few(counts: dict[str, Any], floor: str = "") -> str | None:
    """A sentence where images are too few for the features' width, so that the Fréchet distance says less; `floor` is put after it."""
    if not _are_few(counts):
        return None
    width, fewest = counts["width"], _fewest(counts)
    which = "generated" if counts["generated"] == fewest else "reference"
    return (
        f"The Fréchet distance is biased upwards: {fewest:,} {which} images give {width:,} features no covariance of full rank; "
        f"more than {width:,} would. {floor}"
    ).rstrip()


def _floor(counts: dict[str, Any], value: float | None, rest: int | None, held_out: bool, given: bool) -> str:
    """A sentence on what as many real images score.

    Args:
        rest: how many of the reference they were measured against, where they are a part of it and not held out.
        given: distances are to statistics, of which nothing can be taken.
    """
    if value is not None:
        which = "held-out real images score" if rest is None else f"reference images score against the other {rest:,}"
        return f"Its floor is what {counts['real']:,} {which}: {value:.4g}."
    if held_out:
        return ""
    few = f", and the reference is not twice {counts['generated']:,} images, so that as many could be measured against the rest"
    return f"Its floor is not known: no real images are held out{'' if given else few}."


def _are_few(counts: dict[str, Any]) -> bool:
    return _fewest(counts) <= counts["width"]


def _fewest(counts: dict[str, Any]) -> int:
    return min(counts["generated"], counts["reference"] or counts["generated"])


def _real(
    held_out: np.ndarray | None, probabilities: np.ndarray | None, count: int, resamples: int
) -> tuple[np.ndarray | None, np.ndarray | None, int]:
    """`count` held-out images."""
    if held_out is None:
        return None, None, resamples
    rows = drawn(len(held_out), count)
    return held_out[rows], None if probabilities is None else probabilities[rows], resamples


def _reference_count(reference: np.ndarray | None, whole: Whole | None, statistics: Statistics | None) -> int | None:
    """Images behind the Fréchet distances; None where published statistics do not say."""
    if statistics is not None:
        return statistics.count
    if whole:
        return whole.count
    return 0 if reference is None else len(reference)


def _frechet(
    features: np.ndarray | None, against: Statistics | None, resamples: int, seed: int, whole: Whole | None = None
) -> dict[str, Any]:
    if whole and against is not None:
        return {"frechet": frechet_distance(whole.statistics, against), "frechet_interval": None}
    if features is None or against is None or len(features) < 2:
        return {"frechet": None, "frechet_interval": None}
    distance = frechet_distance(statistics_of(features), against)
    ends = list(resampling.interval(features, against, resamples, seed)) if resamples else None
    return {"frechet": distance, "frechet_interval": ends}


def _kernel(reference: np.ndarray | None, features: np.ndarray | None, subsets: int, size: int, seed: int) -> dict[str, Any]:
    pair = None if reference is None or features is None else kid(reference, features, subsets, size, seed)
    return {**dict(zip(("kid", "kid_error"), pair or (None, None), strict=True)), "kid_count": 0 if reference is None else len(reference)}


def _overlap(reference: np.ndarray | None, features: np.ndarray | None, neighbours: int) -> dict[str, Any]:
    """Precision and recall want as many real images as measured ones."""
    shared = 0 if reference is None or features is None else min(len(features), len(reference))
    if reference is None or features is None or shared <= neighbours:
        return {"precision": None, "recall": None, "density": None, "coverage": None, "precision_recall_count": shared}
    return {**overlap(_some(reference, shared), _some(features, shared), neighbours)._asdict(), "precision_recall_count": shared}


def _inception_score(probabilities: np.ndarray | None) -> dict[str, Any]:
    pair = None if probabilities is None else inception_score(_some(probabilities, len(probabilities)))
    return dict(zip(("inception_score", "inception_score_error"), pair or (None, None), strict=True))


def _some(features: np.ndarray, count: int) -> np.ndarray:
    """`count` rows, always the same ones, in a shuffled order."""
    return features[shuffled(len(features))[:count]]
