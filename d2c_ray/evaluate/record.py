"""The evaluation record: everything that a measured number depends on besides the images, and what makes two of them incomparable.

Every metrics.json carries one. Numbers whose records differ in `DIFFERENT` are not of one measure, however alike they look.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# What changes the number, with its name in words.
DIFFERENT = {
    "sampler": "sampler",
    "steps": "sampling steps",
    "guidance": "guidance scale",
    "guidance_interval": "times between which guidance acts",
    "guidance_channels": "channels that are guided",
    "weights": "which weights were sampled",
    "ema_decay": "decay of the averaged weights",
    "vae_decoder": "VAE decoder",
    "vae_precision": "precision of the VAE decoder",
    "class_draw": "how classes were drawn",
    "sample_precision": "precision of sampling",
    "image_size": "size of the images",
    "generated": "generated images measured",
    "network": "feature network",
    "network_weights": "weights of the feature network",
    "network_image_size": "pixels a side the network sees",
    "reference": "real images in the reference",
    "reference_images": "which real images",
    "reference_statistics": "statistics that distances are taken to",
    "neighbours": "neighbours of precision, recall, density and coverage",
    "kid_subsets": "subsets of the KID",
    "kid_subset_size": "images a subset of the KID",
}
# The rest is said beside a number and does not make it another measure. A seed draws another sample from the same distribution, so
# that the numbers of two seeds show the measure's noise; images shown and seeds trained are what students are compared by; the
# bootstrap widens or narrows an interval and moves no number. Which real images a seed of the measuring holds out is in
# `reference_images`.

# Of these, how the images were sampled. Images from elsewhere do not say it.
_OF_SAMPLING = (
    "sampler", "steps", "guidance", "weights", "ema_decay", "vae_decoder", "vae_precision", "class_draw", "sample_precision",
)  # fmt: skip

# What older records say it under: here a hash of features, which agrees with others of its kind alone.
FORMERLY = {"reference_images": "reference_features"}
# What a record that does not say it can only mean: records from before there was a choice.
DEFAULTS: dict[str, Any] = {"guidance_interval": [0.0, 1.0], "guidance_channels": "all"}


def of(record: Mapping[str, Any], key: str) -> Any:
    """A record's value at a key in the one form that values are compared in; None where it is not known.

    Without guidance (scale 1) there is nothing for an interval or a choice of channels to act on, whatever they say.
    """
    value = record.get(key, record.get(FORMERLY.get(key, key)))
    if key in DEFAULTS and record.get("guidance") is not None:
        value = DEFAULTS[key] if value is None or float(record["guidance"]) == 1.0 else value
    if isinstance(value, tuple):
        value = list(value)
    return value  # 1 and 1.0 are one number, also in lists


def images_hash(images: Iterable[str]) -> str:
    """16 hex digits of which images these are, in any order, of what tells each of them from others.

    Not of their features, whose last bits change with the machine and with the batch they are made in.
    """
    return hashlib.sha256("\n".join(sorted(images)).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def differences(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Every key of `DIFFERENT` in which the records are not all alike, with each record's value in their order.

    What one record says and another does not counts as a difference: nobody can vouch that they are alike.
    """
    found = []
    for key in DIFFERENT:
        values = [of(record, key) for record in records]
        if any(value != values[0] for value in values[1:]):
            found.append((key, values))
    return found


def unknown(record: Mapping[str, Any]) -> list[str]:
    """The keys of `DIFFERENT` of which a record says nothing, so that two that agree in them need not be alike.

    Where nothing is known of the sampling its keys are all among them, but for what acts with guidance alone. Else a value of
    None is one: pixels have no VAE, a reference of images no statistics.
    """
    silent = record.get("sampler") is None
    found = []
    for key in DIFFERENT:
        if of(record, key) is not None or key in DEFAULTS:
            continue
        if key == "vae_precision":
            missing = silent or record.get("vae_decoder") is not None
        elif key in _OF_SAMPLING:
            missing = silent or key not in record
        else:
            missing = key not in record
        if missing:
            found.append(key)
    return found


def in_words(value: Any) -> str:
    """A record's value as a reader meets it."""
    return "not known" if value is None else f"{value:,}" if type(value) is int else str(value)
