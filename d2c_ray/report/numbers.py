"""How measured numbers are shown: rows of real images, students and floors under the same columns, everywhere alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Measure: (heading, which way is better).
COLUMNS = {
    "frechet": "Fréchet distance ↓",
    "kid": "KID ↓",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "density": "density ↑",
    "coverage": "coverage ↑",
    "inception_score": "Inception Score ↑",
    "agreement": "label agreement ↑",
}
NONE = "–"
SHOWN_CLASSES = 5  # of the best, and of the worst
FEW_SAMPLES = 10_000  # below this a Fréchet distance is dominated by its own bias


@dataclass
class Row:
    """A line of numbers.

    Attributes:
        kind: real | student | unguided | floor.
        values: what `measure` found of these images, with `agreement` (the share that shows the class asked for).
    """

    name: str
    kind: str
    count: int | None
    values: dict[str, Any]
    colour: str | None = None


def rows(name: str, metrics: dict[str, Any], colour: str | None = None, unguided: dict[str, Any] | None = None) -> list[Row]:
    """A student's numbers, unguided ones below them, and its floor; without the row of real images."""
    counts = metrics["counts"]
    found = [Row(name, "student", counts["generated"], _with_agreement(metrics, "generated", "label_agreement"), colour)]
    if unguided:
        values = _with_agreement(unguided, "generated", "label_agreement")
        found.append(Row(f"{name}, without guidance", "unguided", unguided["counts"]["generated"], values, colour))
    if counts["subset"]:
        found.append(Row(f"floor: its subset of {counts['subset']:,}", "floor", counts["subset"], metrics["subset"], colour))
    return found


def real_row(metrics: dict[str, Any], held_out: bool = True) -> list[Row]:
    """The row of real images, where there are any: held-out ones, or else a part of the reference."""
    if not metrics["counts"]["real"]:
        return []
    return [
        Row(
            "real images, held out" if held_out else "real images of the reference",
            "real",
            metrics["counts"]["real"],
            _with_agreement(metrics, "real", "probe_accuracy"),
        )
    ]


def columns(shown: Sequence[Row]) -> list[str]:
    """The measures that at least one row has; the first three always."""
    return [key for i, key in enumerate(COLUMNS) if i in (0, 2, 3) or any(row.values.get(key) is not None for row in shown)]


def cell(values: dict[str, Any], key: str) -> str:
    """A measure with its interval or error, as text."""
    value, beside = value_and_error(values, key)
    return f"{value} {beside}" if beside else value


def value_and_error(values: dict[str, Any], key: str) -> tuple[str, str]:
    """A measure as text, and its interval (`[low, high]`) or error (`± e`); empty where it has none."""
    value = values.get(key)
    if value is None:
        return NONE, ""
    form = {"agreement": "{:.1%}".format, "frechet": distance, "kid": "{:.4f}".format, "inception_score": "{:.2f}".format}.get(
        key, "{:.3f}".format
    )
    spread = values.get(f"{key}_spread")  # over seeds
    error = values.get(f"{key}_error") if spread is None else spread
    if error is not None:
        return form(value), f"± {form(error)}"
    if key == "frechet" and values.get("frechet_interval"):
        low, high = values["frechet_interval"]
        return form(value), f"[{form(low)}, {form(high)}]"
    return form(value), ""


def fields(values: dict[str, Any]) -> dict[str, Any]:
    """The measures as numbers, with their errors, deviations over seeds and intervals where they have any."""
    every = (f"{key}{more}" for key in COLUMNS for more in ("", "_error", "_spread", "_interval"))
    return {key: values[key] for key in every if values.get(key) is not None}


def as_fields(shown: Sequence[Row], network: str) -> list[tuple[str, dict[str, Any]]]:
    """The rows for machines: of each a text, and fields. `arm` is the student it belongs to; real images belong to none."""
    found, arm = [], ""
    for row in shown:
        arm = row.name if row.kind == "student" else arm if row.kind != "real" else ""
        said = ", ".join(f"{COLUMNS[key].rstrip(' ↑↓')} {value_and_error(row.values, key)[0]}" for key in columns([row]))
        about = {"network": network, "arm": arm, "row": row.name, "kind": row.kind, "images": row.count}
        found.append((f"{row.name}: {said}", {**about, **fields(row.values)}))
    return found


def as_text(shown: Sequence[Row], brief: bool = False) -> list[str]:
    """The rows as aligned lines, without intervals and errors where it is to be `brief`."""
    keys = columns(shown)
    body = [
        [
            row.name,
            f"{row.count:,}" if row.count is not None else NONE,
            *((value_and_error(row.values, key)[0] if brief else cell(row.values, key)) for key in keys),
        ]
        for row in shown
    ]
    return grid(["", "images", *(COLUMNS[key] for key in keys)], body)


def grid(headings: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A table as aligned lines: the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in (headings, *body)) for i in range(len(headings))]
    return [
        "  ".join(
            text.ljust(width) if not i else text.rjust(width) for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (headings, *body)
    ]


def copying(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What the copying measure says, a label and a value each."""
    real = found.get("median_real")
    said = [
        ("median distance to the nearest training image", f"{found['median_generated']:.4g}"),
        ("of held-out real images", NONE if real is None else f"{real:.4g}"),
        ("nearer to one than real images are", _share(found.get("share_closer"))),
        ("expected of real images", _share(found.get("share_closer_expected"))),
    ]
    twins, training = found.get("real_duplicates"), found.get("training")
    if twins is not None:
        said.append(("held-out real images left out: they are training images", f"{twins:,.0f}"))
    if training is not None:
        both = " in both orientations" if found.get("orientations") == 2 else ""
        said.append(("training images looked among", f"{training:,.0f}{both}"))
    return said


def copying_lines(found: dict[str, Any]) -> list[str]:
    """The same as text, with the most suspicious pairs where they have names."""
    said = ["copying", *(f"  {label}: {value}" for label, value in copying(found))]
    pairs = [pair for pair in found.get("pairs", []) if "nearest" in pair]
    return said + [
        f"  {pair['image']} is {pair['distance']:.4g} from {pair['nearest']}{', mirrored' if pair.get('mirrored') else ''}"
        for pair in pairs[:5]
    ]


def per_class(found: dict[str, float], most: int = SHOWN_CLASSES) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """Best and worst classes by Fréchet distance, `most` of each at most and no class twice; the worst first among the worst."""
    order = sorted(found.items(), key=lambda item: (item[1], item[0]))
    worst = order[::-1][: min(most, len(order) // 2)]
    return order[: min(most, len(order) - len(worst))], worst


def per_class_line(found: dict[str, float]) -> str:
    """The same as text."""

    def listed(some: list[tuple[str, float]]) -> str:
        return ", ".join(f"{name} {distance(value)}" for name, value in some)

    best, worst = per_class(found)
    return f"Fréchet distance of {len(found):,} classes each: best {listed(best)}" + (f"; worst {listed(worst)}" if worst else "")


def distance(value: float) -> str:
    """A Fréchet distance: two decimals where they can mean something."""
    return f"{value:.2f}" if value < 100 else f"{value:.1f}"


def what_it_is(network: str) -> str:
    """What a distance in a network's features may be called and set beside, headed by the network's name."""
    if network == "inception":
        return f"{network}: the Fréchet distance is an FID: one to compare with others at the same count, to the same reference, of images decoded and resized alike."
    return f"{network}: distances are in its features, not Inception's: none of them is an FID or comparable with a published one."


def network_notes(network: str, own: dict[str, Any]) -> list[str]:
    """What must be known to read the numbers in one network, headed by its name.

    Args:
        own: as `measure` found it in this network.
    """
    return [what_it_is(network), *([f"{network}: {own['too_few']}"] if own.get("too_few") else [])]


def caveats(metrics: dict[str, Any]) -> list[str]:
    """What must be known to read one student's numbers in whatever network, as far as they say it themselves."""
    return list(metrics.get("notices") or [])


def _with_agreement(metrics: dict[str, Any], part: str, key: str) -> dict[str, Any]:
    return {**metrics[part], "agreement": metrics.get(key), "agreement_spread": metrics.get(f"{key}_spread")}


def _share(value: float | None) -> str:
    return NONE if value is None else f"{value:.2%}"


def in_bytes(count: float) -> str:
    """Bytes in decimal units, as disks are sold and papers count."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.4g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"
    return f"{count:.0f} bytes"
