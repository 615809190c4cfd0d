"""`d2c evaluate IMAGES --reference IMAGES`: anybody's images measured, in one process, without a run."""

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2c_ray.config import INCEPTION, EvaluateConfig
from d2c_ray.data import image_sets, reference_stats
from d2c_ray.errors import UserError
from d2c_ray.evaluate.frechet import Statistics
from d2c_ray.evaluate.frechet import statistics as statistics_of
from d2c_ray.evaluate.measures import measure
from d2c_ray.evaluate.record import images_hash
from d2c_ray.models import networks
from d2c_ray.progress import Progress
from d2c_ray.report import numbers
from d2c_ray.rundir import versions
from d2c_ray.seeding import derive

SHOWN_REJECTS = 5


@dataclass
class Embedded:
    """A set's images in every network, a row for each that could be decoded.

    Attributes:
        labels: -1 where there are none. class_names: of the labels, where class folders gave them.
    """

    role: str
    path: str
    kind: str
    names: list[str]
    labels: np.ndarray
    class_names: list[str] | None
    features: dict[str, np.ndarray]
    probabilities: dict[str, np.ndarray | None]
    sizes: dict[str, int]
    rejected: list[tuple[str, str]]
    hashes: list[str] = field(default_factory=list)  # of every image's pixels
    mirrored: dict[str, np.ndarray] = field(default_factory=dict)  # features of the mirror images, where they were asked for

    def facts(self) -> dict[str, Any]:
        return {
            "path": self.path, "kind": self.kind, "images": len(self.names), "sizes": self.sizes, "rejected": len(self.rejected),
            "rejected_first": [f"{name}: {reason}" for name, reason in self.rejected[:SHOWN_REJECTS]],
        }  # fmt: skip


def evaluate(
    images: str, reference: str, options: EvaluateConfig, *, train: str = "", held_out: str = "", mirror: bool = True,
    size: int = 0, max_pixels: int = 0, save_statistics: str = "", device: torch.device | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measures one set of images against another.

    Args:
        images, reference: as `image_sets.find` reads them; the reference may also be an .npz of statistics.
        train: the images that a model was trained on, for its floor and for copying.
        mirror: look for copies of their mirror images too, which a model that was trained with flips has seen.
        held_out: real images that are not in the reference, measured beside; a number: so many taken out of the reference.
        size: pixels a side of ADM's centre crop of every image; 0: as they are.
        max_pixels: of an image; larger ones are left out, and said to be. 0: `image_sets.MAX_PIXELS`.
        save_statistics: file for the reference's mean and covariance in the main network; empty: none.

    Returns:
        As metrics.json: `measure` in the main network, `more` in the others, `record`; `sets` says what was read.

    Raises:
        UserError: nothing there or of another layout, fewer than two images, statistics of another width, no weights.
    """
    started = time.monotonic()
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sets, taken = {"images": image_sets.find(images)}, 0
    if image_sets.holds_images(reference):
        sets["reference"] = image_sets.find(reference)
    if held_out.isdigit():
        taken = _to_take(int(held_out), sets)
    elif held_out:
        sets["held_out"] = image_sets.find(held_out)
    if save_statistics and "reference" not in sets:
        raise UserError(f"--save-statistics: the reference is statistics alone, which are in {reference} already; images would do.")
    if train:
        sets["train"] = image_sets.find(train)
    for role, found in sets.items():
        _refuse_few(role, str(found.path), found.count)
    facts = networks.every(options)
    given = _statistics(reference, options.network, facts[options.network]["width"])
    if given is None and "reference" not in sets:
        raise UserError(f"--reference {reference} holds neither images nor statistics; {image_sets.WOULD_DO}.")
    loaded = {name: networks.load(name, options, device) for name in facts}
    with Progress("embed", sum(found.count for found in sets.values()), "images") as progress:
        read = {
            role: _embed(
                role, found, loaded, options.device_batch, size, max_pixels or image_sets.MAX_PIXELS, progress, mirror and role == "train"
            )
            for role, found in sets.items()
        }
    if taken:
        read["reference"], read["held_out"] = _split(read["reference"], taken, options.seed)
    if save_statistics:
        path = Path(save_statistics).expanduser()
        reference_stats.write(path, statistics_of(read["reference"].features[options.network]))
    labelled, names, said = _unify(read)
    measured = {name: _measure(name, read, labelled, names, given if name == options.network else None, options) for name in facts}
    main = measured.pop(options.network)
    record = _record(read, facts[options.network], main, options, size, given)
    said += dict.fromkeys(note for own in (main, *measured.values()) for note in own["notes"])
    return {
        **main, "record": record, "notices": _notices(options, facts, given, reference) + said,
        "more": {facts[name]["network"]: {**found, "network": facts[name]} for name, found in measured.items()}, "unguided": None,
        "name": read["images"].path, "sets": {role: found.facts() for role, found in read.items()},
        "statistics": reference if given is not None else None, "seconds": round(time.monotonic() - started, 2), "device": str(device), "versions": versions(),
    }  # fmt: skip


def lines(found: dict[str, Any]) -> list[str]:
    """What `evaluate` found, as text."""
    record, said = found["record"], []
    for role, facts in found["sets"].items():
        sizes = list(facts["sizes"].items())
        shown = ", ".join(size if len(sizes) == 1 else f"{count:,} of {size}" for size, count in sizes[:3])
        rest = f" and {len(sizes) - 3} more sizes" if len(sizes) > 3 else ""
        said.append(f"{role.replace('_', ' ')}: {facts['images']:,} images of {shown}{rest} px ({facts['kind']} {facts['path']})")
        if facts["rejected"]:
            said.append(f"  {facts['rejected']:,} could not be decoded and are left out: " + "; ".join(facts["rejected_first"]))
            if any(" pixels, more than " in reason for reason in facts["rejected_first"]):
                said.append("  --max-pixels takes larger ones, at three bytes a pixel and several at once")
        if len(sizes) > 1:
            said.append(
                f"  of different sizes: each is brought to {record['network_image_size']} x {record['network_image_size']} px on its own; --size crops all alike first"
            )
    if found["statistics"]:
        said.append(f"Fréchet distances in {record['network']} are to the statistics in {found['statistics']}")
    for name, own in {record["network"]: found, **found["more"]}.items():
        rows = numbers.real_row(own, "held_out" in found["sets"]) + numbers.rows(found["name"], own)
        said += ["", f"measured in {name}", *numbers.as_text(rows)]
        if own.get("per_class"):
            said += ["", numbers.per_class_line(own["per_class"])]
        if own.get("copying"):
            said += ["", *numbers.copying_lines(own["copying"])]
    said += ["", *(f"note: {note}" for note in notes(found))]
    return said


def notes(found: dict[str, Any]) -> list[str]:
    """What must be known to read the numbers."""
    every = {found["record"]["network"]: found, **found["more"]}
    said = [note for network, own in every.items() for note in numbers.network_notes(network, own)]
    if INCEPTION not in every:
        said.append("--network inception measures the FID itself (with the extra: pip install 'd2c-ray[fid]').")
    said += numbers.caveats(found)
    if "held_out" not in found["sets"]:
        said.append("what real images score that are not in the reference is not known: --held-out, a set of such, would show it.")
    if (found.get("copying") or {}).get("orientations") == 2:
        said.append("copies are sought in both orientations, as training with flips shows them; --no-mirror, where it had none.")
    if not found["counts"]["subset"]:
        said.append("whether the images copy is not known: --train, the images that the model saw, would show it.")
    return said


def _to_take(count: int, sets: dict[str, image_sets.ImageSet]) -> int:
    if "reference" not in sets:
        raise UserError(f"--held-out {count}: the reference is statistics alone, of which nothing can be taken; give a set of real images.")
    most = sets["reference"].count // 2
    if not 2 <= count <= most:
        raise UserError(f"--held-out {count} of {sets['reference'].count} images in the reference: 2 to {most} would do.")
    return count


def _refuse_few(role: str, path: str, count: int) -> None:
    if count < 2:
        raise UserError(
            f"{role.replace('_', ' ')}: {count} image in '{path}' has no spread to measure; 2 at the very least, thousands to mean something."
        )


def _statistics(reference: str, network: str, width: int) -> Statistics | None:
    """The statistics of a reference that holds some, where distances are to be taken to them.

    ADM's reference batches hold images and Inception's statistics of many more: in another network their images alone count.
    """
    if not image_sets.holds_statistics(reference):
        return None
    path = Path(reference).expanduser()
    if image_sets.holds_images(reference) and reference_stats.width_of("--reference", path) != width:
        return None
    return reference_stats.read("--reference", path, width, network)


def _embed(
    role: str,
    found: image_sets.ImageSet,
    loaded: dict[str, networks.Network],
    batch: int,
    size: int,
    max_pixels: int,
    progress: Progress,
    mirror: bool = False,
) -> Embedded:
    """Reads a set and has every network see its images, and their mirror images where it is to `mirror` them."""
    read = image_sets.Read()
    features: dict[str, list[np.ndarray]] = {name: [] for name in loaded}
    turned: dict[str, list[np.ndarray]] = {name: [] for name in loaded if mirror}
    waiting_turned: dict[str, list[torch.Tensor]] = {name: [] for name in turned}
    probabilities: dict[str, list[np.ndarray]] = {name: [] for name in loaded}
    waiting: dict[str, list[torch.Tensor]] = {name: [] for name in loaded}
    hashes: list[str] = []

    def forward() -> None:
        for name, network in loaded.items():
            own, odds = network.both_of(waiting[name])
            features[name].append(own)
            if odds is not None:
                probabilities[name].append(odds)
            waiting[name].clear()
        for name, images in waiting_turned.items():
            turned[name].append(loaded[name].both_of(images)[0])
            images.clear()

    seen = 0
    for pixels in image_sets.decoded(found, size, max_pixels, read):
        hashes.append(f"{pixels.shape} {hashlib.sha256(pixels.tobytes()).hexdigest()}")
        # As large as each network sees it, whatever size it had: every forward is full, and no large image waits for others.
        for name, network in loaded.items():
            waiting[name].append(network.prepare(pixels))
            if mirror:
                waiting_turned[name].append(network.prepare(pixels[:, ::-1].copy()))
        if len(read.names) % batch == 0:
            forward()
            progress.advance(len(read.names) + len(read.rejected) - seen)
            seen = len(read.names) + len(read.rejected)
    if len(read.names) % batch:
        forward()
    progress.advance(len(read.names) + len(read.rejected) - seen)
    if read.rejected and len(read.names) < 2:
        name, reason = read.rejected[0]
        raise UserError(
            f"{role}: {len(read.rejected):,} of {found.count:,} images in '{found.path}' cannot be decoded, the first {name}: {reason}."
        )
    _refuse_few(role, str(found.path), len(read.names))
    return Embedded(
        role, str(found.path), found.kind, read.names, np.asarray(read.labels, np.int64), found.class_names,
        {name: np.concatenate(parts) for name, parts in features.items()},
        {name: np.concatenate(parts) if parts else None for name, parts in probabilities.items()}, read.sizes, read.rejected, hashes,
        {name: np.concatenate(parts) for name, parts in turned.items()},
    )  # fmt: skip


def _split(reference: Embedded, count: int, seed: int) -> tuple[Embedded, Embedded]:
    """The reference without `count` images drawn at random, and those."""
    order = np.random.Generator(np.random.Philox(derive(seed, "held out"))).permutation(len(reference.names))

    def some(rows: np.ndarray, role: str) -> Embedded:
        return Embedded(
            role, reference.path, reference.kind, [reference.names[i] for i in rows], reference.labels[rows], reference.class_names,
            {name: values[rows] for name, values in reference.features.items()},
            {name: None if values is None else values[rows] for name, values in reference.probabilities.items()},
            reference.sizes, reference.rejected if role == "reference" else [], [reference.hashes[i] for i in rows],
        )  # fmt: skip

    return some(np.sort(order[count:]), "reference"), some(np.sort(order[:count]), "held_out")


def _unify(read: dict[str, Embedded]) -> tuple[bool, list[str], list[str]]:
    """Numbers the classes of all sets alike, by name where folders name them.

    Returns:
        Whether labels are of the same classes, so that per-class measures and label agreement mean something; the classes'
        names, none where no folders name them; and what must be said of it.
    """
    known = [read[role] for role in ("images", "reference", "held_out") if role in read]
    named = [own for own in known if own.class_names]
    names = sorted({name for own in named for name in own.class_names or []})
    for own in named:
        assert own.class_names
        own.labels = np.asarray([names.index(name) for name in own.class_names])[own.labels]
    if len(known) < 2 or "reference" not in read or not all((own.labels >= 0).all() for own in known):
        return False, names, []
    said = []
    real = read["reference"].class_names
    for own in named:
        strange = sorted(set(own.class_names or []) - set(real)) if real else []
        if not strange:
            continue
        some = f"{own.role.replace('_', ' ')} has {len(strange):,} of its {len(own.class_names or []):,} class folders not in the reference ({', '.join(strange[:3])}{', ...' if len(strange) > 3 else ''})"
        if 2 * len(strange) >= len(own.class_names or []):
            return False, names, [f"{some}: the folders are no classes of the same names, and nothing is measured by class."]
        said.append(f"{some}: no image of these can agree with its label.")
    if len(named) in (0, len(known)):
        return True, names, said
    # Class folders and numbers go together where the numbers can count the folders.
    if not all(own.labels.max() < len(names) for own in known):
        return False, names, ["Class numbers of one set are no places in the class folders of another, and nothing is measured by class."]
    return True, names, [*said, "Class numbers are taken for the places of the class folders in the order of their names."]


def _notices(options: EvaluateConfig, facts: dict[str, dict[str, Any]], given: Statistics | None, reference: str) -> list[str]:
    said = []
    if INCEPTION in facts and facts[INCEPTION]["weights"] != networks.PUBLISHED[:16]:
        said.append(
            f"evaluate.inception={options.inception} is not the network that clean-fid publishes: no number here compares with a published FID."
        )
    if given is not None and options.network == INCEPTION and reference_stats.of_adm(Path(reference)):
        said.append(
            "The statistics are ADM's, made with TensorFlow's resize, and the images were resized by clean-fid: distances are close to what ADM's evaluator gives, and not the same."
        )
    return said


def _measure(
    name: str, read: dict[str, Embedded], labelled: bool, names: list[str], given: Statistics | None, options: EvaluateConfig
) -> dict[str, Any]:
    def features(role: str) -> np.ndarray | None:
        return read[role].features[name] if role in read else None

    def labels(role: str) -> np.ndarray | None:
        return (read[role].labels if labelled else np.zeros(len(read[role].names), np.int64)) if role in read else None

    found = measure(
        reference=features("reference"), reference_labels=labels("reference"), held_out=features("held_out"), held_out_labels=labels("held_out"),
        generated=read["images"].features[name], asked=labels("images"), subset=features("train"), mirrored=read["train"].mirrored.get(name) if "train" in read else None, neighbours=options.neighbours, statistics=given,
        probabilities=read["images"].probabilities[name], held_out_probabilities=read["held_out"].probabilities[name] if "held_out" in read else None,
        kid_subsets=options.kid_subsets, kid_subset_size=options.kid_subset_size, bootstrap=options.bootstrap, pairs=options.pairs, seed=options.seed,
        probe=labelled and "held_out" in read,
    )  # fmt: skip
    by_class = found["per_class"] if labelled else None
    found["per_class"] = {names[int(label)] if names else label: value for label, value in by_class.items()} if by_class else None
    for pair in (found.get("copying") or {}).get("pairs", []):
        pair["image"], pair["nearest"] = read["images"].names[pair["index"]], read["train"].names[pair["sample_id"]]
    return found


def _record(
    read: dict[str, Embedded], network: dict[str, Any], found: dict[str, Any], options: EvaluateConfig, size: int, given: Statistics | None
) -> dict[str, Any]:
    """The evaluation record as far as images alone tell it: nobody knows what sampler made them."""
    sizes = [
        int(width) if width == height else f"{width} x {height}" for width, height in (shown.split(" x ") for shown in read["images"].sizes)
    ]
    real = read["reference"].hashes if "reference" in read else None
    return {
        "network": network["network"], "network_weights": network["weights"], "network_image_size": network["image_size"],
        "image_size": size or (sizes[0] if len(sizes) == 1 else "several"),
        "generated": found["counts"]["generated"], "reference": len(real) if real is not None else None,
        "reference_images": images_hash(real) if real is not None else None,
        "reference_statistics": reference_stats.content_hash(given) if given is not None else None,
        "neighbours": options.neighbours, "kid_subsets": options.kid_subsets, "kid_subset_size": options.kid_subset_size, "bootstrap": options.bootstrap, "evaluate_seed": options.seed,
        "copying_orientations": (found["copying"] or {}).get("orientations"),
    }  # fmt: skip
