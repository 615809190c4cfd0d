"""The dataset card: README.md of a condensed dataset, with the header that dataset hubs read, and its picture."""

import re
import shlex
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from d2c_ray.config import DataConfig
from d2c_ray.data import provenance, tables
from d2c_ray.data.decode import decode
from d2c_ray.evaluate.record import differences
from d2c_ray.plan import READS
from d2c_ray.progress import clock
from d2c_ray.report import contact_sheet, numbers
from d2c_ray.rundir import write_bytes, write_text
from d2c_ray.wording import in_markdown

NAME, PICTURE = "README.md", "examples.png"
SHOWN_CLASSES, SHOWN_IMAGES = 10, 8  # of the picture
SHOWN_PIXELS = 96  # a side of an image in it, at most
NAMED_CLASSES = 100
_SIZES = (
    (1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"), (10**11, "10B<n<100B"), (10**12, "100B<n<1T"),
)  # fmt: skip
_BIASES = {
    "interval": "Every so many ranks are taken, from the easiest image of a class on: the easiest end is favoured and the hardest images are left out.",
    "easiest": "Only the easiest images of each class are in it: the typical and the plain, nothing unusual.",
    "hardest": "Only the hardest images of each class are in it: the unusual, the cluttered and the mislabelled.",
    "medium": "Images of middling difficulty alone are in it: neither the plainest nor the most unusual.",
    "random": "The draw is random: rare kinds of image may be missing by chance.",
    "all": "Every image is in it that could be decoded: it is the source itself, with what is attached.",
    "stratified": "Every range of difficulty is drawn from alike, so rare scores are over-represented; a cutoff leaves the hardest out.",
}
_BY_FEATURES = "It was chosen in the features of a frozen network: what that network cannot tell apart was not spread out."


def write(folder: str | Path, stated: dict[str, Any], metrics: dict[str, dict[str, Any]] | None = None) -> Path:
    """Writes README.md and examples.png of a condensed dataset; gives the card's path.

    Args:
        stated: its provenance.
        metrics: of the students trained on it, by arm, as their metrics.json says; None: not evaluated.
    """
    folder = Path(folder)
    chosen = tables.read(folder / provenance.SELECTION, ["sample_id", "label", "rank"])
    labels = np.unique(chosen.column("label").to_numpy())
    labels = labels[contact_sheet.evenly(len(labels), SHOWN_CLASSES)]
    if not (folder / PICTURE).is_file():
        write_bytes(folder / PICTURE, _picture(folder, stated, chosen, labels))
    path = folder / NAME
    write_text(path, render(stated, labels.tolist(), metrics))
    return path


def update(folder: str | Path, metrics: dict[str, dict[str, Any]]) -> Path:
    """Writes the card of a condensed dataset anew, with what students trained on it reach."""
    return write(folder, provenance.read(folder), metrics)


def render(stated: dict[str, Any], pictured: list[int], metrics: dict[str, dict[str, Any]] | None = None) -> str:
    """The card's text: the same for the same arguments; `pictured` are the labels that have a row in the picture."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        autoescape=False,  # Markdown: what is not ours goes through `text` or `code`
    )  # fmt: skip
    page = environment.get_template("card.md.jinja").render(**_context(stated, pictured, metrics))
    return re.sub(r"\n{3,}", "\n\n", page)


def text(value: Any) -> str:
    """Words that are not ours, so that nothing in them acts."""
    return in_markdown(value)


def code(value: Any) -> str:
    """The same as a span of code."""
    line = " ".join(str(value).split()).replace("|", "¦")  # a bar would end the cell of a table
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{space}{line}{space}{fence}"


def place(path: Any) -> str:
    """A path without the folders of the maker's disk, which concern nobody; names of a hub (owner/model) as they are."""
    path = str(path)
    return PurePosixPath(path).name or path if _is_local(path) else path


def _is_local(path: str) -> bool:
    return Path(path).is_absolute() or path.startswith((".", "~"))


def _context(stated: dict[str, Any], pictured: list[int], metrics: dict[str, dict[str, Any]] | None) -> dict[str, Any]:
    data, selection, files = stated["data"], stated["selection"], stated["files"]
    condensed = (
        f"all {stated['rows']:,} images" if stated["selection"].get("selector") == "all" else f"condensed to {stated['rows']:,} images"
    )
    title = f"{_source_name(stated)}, {condensed}"
    classes = _shown(stated["class_names"], NAMED_CLASSES)
    columns, snippets = _columns(stated), _snippets(stated)
    selector = selection.get("selector", "")
    return {
        "header": _header(stated, " ".join(title.split())), "title": text(title), "num_images": f"{stated['rows']:,}", "classes": stated["class_names"],
        "candidates": _candidates(selection), "size": _bytes(sum(entry["bytes"] for entry in files.values())),
        "pictures": _picture_words(stated, pictured), "contents": _contents(stated),
        "files": [(code(name), f"{entry['rows']:,}" if entry.get("rows") is not None else "", f"{entry['bytes']:,}") for name, entry in _few(files)],
        "columns": columns, "shown_classes": classes, "chosen": _chosen(selection), "settings": _settings(selection), "attached": _attached(stated),
        "cost": [*((text(stage), f"{seconds:,.1f}") for stage, seconds in stated["cost_seconds"].items()), _total(stated["cost_seconds"])],
        "results": _results(metrics) if metrics else [], "records": _records(metrics) if metrics else [], "code": snippets,
        "whole": selector == "all", "command": _command(stated), "made": _made(stated), "bias": _BIASES.get(selector, _BY_FEATURES), "image_size": data["image_size"],
    }  # fmt: skip


def _header(stated: dict[str, Any], title: str) -> str:
    """The YAML that hubs read, without its fences."""
    import yaml

    size = next((name for most, name in _SIZES if stated["rows"] < most), "n>1T")
    tasks = ["unconditional-image-generation", *(["image-classification"] if stated["class_names"] else [])]
    configs = {"default": "part-*.parquet", "classes": "classes.parquet", "selection": provenance.SELECTION}
    fields = {
        "pretty_name": title,
        "size_categories": [size],
        "task_categories": tasks,
        "tags": ["dataset-condensation", "dataset-distillation", "diffusion", "d2c"],
        "configs": [
            {"config_name": name, "data_files": [{"split": "train", "path": path}], **({"default": True} if name == "default" else {})}
            for name, path in configs.items()
        ],
    }
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=1000)


def _source_name(stated: dict[str, Any]) -> str:
    """The last part of the source's path: where it lay on the maker's disk concerns nobody."""
    data = stated["data"]
    return PurePosixPath(str(data.get("path", "")).rstrip("/")).name or str(data.get("source", "")) or "Images"


def _candidates(selection: dict[str, Any]) -> str:
    """How many images there were to choose from."""
    share, images = selection.get("share"), selection.get("images")
    return f"{round(images / share):,} ({share:.2%})" if share and images else "a larger dataset"


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"


def _few(files: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The inventory by name, the parts as one line."""
    parts = [entry for name, entry in files.items() if name.startswith("part-")]
    rest = sorted((name, entry) for name, entry in files.items() if not name.startswith("part-"))
    rows: list[Any] = [entry.get("rows") for entry in parts]
    total = {"bytes": sum(entry["bytes"] for entry in parts), "rows": None if None in rows else sum(rows)}
    return [(f"part-*.parquet ({len(parts)})", total), *rest]


def _contents(stated: dict[str, Any]) -> list[tuple[str, str]]:
    data = stated["data"]
    names = stated["class_names"]
    return [
        ("images", f"{stated['rows']:,}, encoded as the source had them; used at {data['image_size']} x {data['image_size']} px, {data['channels']} channels"),
        ("classes", f"{len(names):,}" if names else "none"),
        ("source", text(_source_name(stated)) + (f" ({text(data['source'])})" if data.get("source") else "")),
        ("horizontal flips", _flips(stated)),
        ("fingerprint", code(stated["fingerprint"])),
    ]  # fmt: skip


def _flips(stated: dict[str, Any]) -> str:
    if not stated["flip"]:
        return "off: images are trained on as they are"
    return (
        "on: what is stored is stored of both sides, the rest is made of the side that is shown"
        if provenance.in_training(stated)
        else "both sides attached"
    )


def _columns(stated: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name, type and meaning of the columns of a part."""
    found = [
        ("sample_id", "int64", "the image's number in the source"),
        ("key", "string", "which image of the source it is"),
        ("label", "int64", "class, by `classes.parquet`" if stated["class_names"] else "-1: no classes"),
        ("image", "struct<bytes, path>", "encoded bytes"),
    ]
    both = ", side 0 the image, side 1 mirrored" if stated["flip"] else ""
    for name, (dtype, shape, what) in tensors(stated).items():
        found.append((name, f"{dtype} {' x '.join(map(str, shape))}", what + (both if len(shape) > 1 and name != "pixels" else "")))
    return found


def tensors(stated: dict[str, Any]) -> dict[str, tuple[str, list[int], str]]:
    """dtype, shape of a row, and meaning of every tensor column; fixed-size binary in the file."""
    sides, latent, data = 1 + stated["flip"], stated["latent"], stated["data"]
    found: dict[str, tuple[str, list[int], str]] = {}
    online = provenance.in_training(stated)
    if latent["kind"] == "pixels" or online:
        found["pixels"] = ("uint8", [data["image_size"], data["image_size"], data["channels"]], "decoded and cropped, never flipped")
    if latent["kind"] != "pixels" and "latent" not in online:
        shape = [sides, latent["channels"], latent["side"], latent["side"]]
        found["latent_mean"] = ("float16", shape, "the VAE's posterior mean, unscaled")
        found["latent_std"] = ("float16", shape, "its standard deviation")
    for name, vision in stated["vision"].items():
        tokens = [sides, stated["grid"] ** 2]
        if vision["storage"] == "int8":
            found[name] = (
                "int8",
                [*tokens, vision["width"]],
                f"tokens of {text(place(vision['encoder']))}, row by row, times `{name}_scale`",
            )
            found[f"{name}_scale"] = ("float32", tokens, "one scale a token")
        else:
            found[name] = ("uint16", [*tokens, vision["width"]], f"tokens of {text(place(vision['encoder']))}, row by row, as bf16 bits")
    return found


def _shown(names: list[str], most: int) -> str:
    shown = ", ".join(text(name or f"label {label}") for label, name in enumerate(names[:most]))
    return shown + (f" and {len(names) - most:,} more, in `classes.parquet`" if len(names) > most else "")


def _chosen(selection: dict[str, Any]) -> str:
    selector = selection.get("selector", "?")
    images, teacher = selection.get("images"), selection.get("teacher")
    kept = f" kept {images:,} of {_candidates(selection)} images" if images else " chose the images"
    by = ""
    if selection.get("features"):
        by = f", by where they lie in the features {code(selection['features'])}"
    elif selection.get("scores") and selector != "random":
        by = f", by how hard they are to denoise ({code(selection['scores'])})"
    judged = f" Difficulty was judged by the teacher {code(teacher)}." if teacher else ""
    return f"The selector {code(selector)}{kept}{by}.{judged}"


def _settings(selection: dict[str, Any]) -> list[tuple[str, str]]:
    """The selector's settings and facts, as they were recorded."""
    others = {name for names in READS.values() for name in names} - set(READS.get(selection.get("selector", ""), ()))
    hidden = ("selector", "scores", "features", "teacher", "images", "transport", "notices", *others, "k" if not selection.get("k") else "")
    plain = [(name, value) for name, value in selection.items() if name not in hidden and isinstance(value, (str, int, float))]
    return [(code(name), text(f"{value:.6g}" if isinstance(value, float) else value)) for name, value in plain]


def _attached(stated: dict[str, Any]) -> list[str]:
    sides = "both flips" if stated["flip"] else "no flips"
    lines = []
    latent, words, vae = stated["latent"], stated.get("text"), stated.get("vae")
    if latent["kind"] == "pixels":
        lines.append(f"Pixels, {latent['channels']} x {latent['side']} x {latent['side']}: no VAE.")
    else:
        name = f" of {code(place(vae['path']))} ({vae['precision']})" if vae else ""
        how = (
            "not stored, encoded from the pixels while training"
            if "latent" in provenance.in_training(stated)
            else "posterior mean and standard deviation in fp16"
        )
        lines.append(
            f"Latents{name}: {how}, {latent['channels']} x {latent['side']} x {latent['side']}, {sides}; "
            f"encoder weights {code(latent.get('encoder', 'unknown'))}, scale {latent.get('scale', 1.0)}, shift {latent.get('shift', 0.0)}."
        )
    if words:
        lines.append(
            f"Text states of {code(place(words['encoder']))} (weights {code(words['weights'])}, {words.get('precision', 'fp32')}): {words['tokens']} tokens x {words['width']} a class in bf16, "
            f"for prompts of the form {code(words.get('template', ''))}, in `classes.parquet`."
        )
    else:
        lines.append("No text.")
    for name, vision in stated["vision"].items():
        lines.append(
            f"Vision tokens `{name}` of {code(place(vision['encoder']))} (weights {code(vision['weights'])}, {vision['precision']}) at {vision['image_size']} px: "
            f"{stated['grid']} x {stated['grid']} tokens x {vision['width']}, {sides}, stored as {text(vision['storage'])}; "
            f"the smallest cosine of a stored token to the encoder's own is {vision['cosine_min']:.5f}."
        )
    online = [name for name in provenance.in_training(stated) if name != "latent"]
    lines += [
        f"Vision tokens `{name}`: not stored, encoded from the pixels while training, by the encoder that a training names."
        for name in online
    ]
    if not stated["vision"] and not online:
        lines.append("No vision tokens.")
    return lines


def _total(seconds: dict[str, float]) -> tuple[str, str]:
    total = sum(seconds.values())
    return "**in all**", f"**{total:,.1f}** ({clock(total)})"


def _results(metrics: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Headings, then a row for real images, and for every student and the subset it was trained on."""
    shown: list[numbers.Row] = []
    for arm, found in metrics.items():
        shown += numbers.real_row(found) if not shown else []
        for row in numbers.rows(arm, found, unguided=found.get("unguided")):
            row.name = "floor: the dataset's own images" if row.kind == "floor" else text(row.name)
            shown.append(row)
    keys = numbers.columns(shown)
    headings = ["", "images", *(numbers.COLUMNS[key].rstrip(" ↓↑") for key in keys)]
    return [
        headings,
        *([row.name, f"{row.count:,}", *(numbers.cell(row.values, key).replace(numbers.NONE, "-") for key in keys)] for row in shown),
    ]


def _records(metrics: dict[str, dict[str, Any]]) -> list[str]:
    """The evaluation record of every arm in words, once where they agree, and what must be known to read the numbers."""
    records = {arm: found["record"] for arm, found in metrics.items()}
    said: dict[str, list[str]] = {}
    for arm, record in records.items():
        said.setdefault(_record(record), []).append(arm)
    lines = [words if len(said) == 1 else f"{', '.join(text(arm) for arm in arms)}: {words}" for words, arms in said.items()]
    if len(said) > 1:
        differ = [name for name, _ in differences(list(records.values()))]
        if differ:
            lines.append(
                f"**The rows above were not measured alike:** their records differ in {', '.join(text(name) for name in differ)}. Compare them with care."
            )
    if min(found["counts"]["generated"] for found in metrics.values()) < numbers.FEW_SAMPLES:
        lines.append(
            f"At fewer than {numbers.FEW_SAMPLES:,} generated images a Fréchet distance is biased upwards, for real images too: read it only beside the row of real images."
        )
    lines.append(numbers.what_it_is(text(next(iter(records.values())).get("network", "?"))))
    return lines


def _record(record: dict[str, Any]) -> str:
    """An evaluation record in words."""
    known = {
        "sampler": "{} sampler", "steps": "{} steps", "guidance": "guidance {}", "guidance_interval": "in the interval {}", "guidance_channels": "of {} channels", "weights": "{} weights",
        "ema_decay": "EMA decay {}", "vae_decoder": "VAE decoder {}", "vae_precision": "in {}", "class_draw": "{} class draw", "sample_seed": "sampling seed {}",
        "sample_precision": "sampled in {}", "train_images": "trained on {} images shown", "network": "measured in {}", "network_weights": "(weights {})",
        "network_image_size": "at {} px", "image_size": "images of {} px", "generated": "{} generated images", "reference": "{} real ones in the reference",
        "reference_images": "(images {})", "reference_statistics": "(distances to the statistics {})", "neighbours": "precision and recall with {} neighbours",
        "kid_subsets": "KID over {} subsets", "kid_subset_size": "of {} images", "bootstrap": "{} resamplings behind intervals",
        "probe_rows": "a label probe fitted on {} real images", "reference_rows": "KID from {} real ones", "copying_orientations": "copies sought in {} orientation(s)", "seeds": "{} training seed(s)",
    }  # fmt: skip
    words = [
        known[name].format(text(f"{record[name]:,}" if type(record[name]) is int else record[name]))
        for name in known
        if record.get(name) is not None
    ]
    more = [f"{text(name)} {text(value)}" for name, value in record.items() if name not in known and value is not None]
    return f"How it was measured: {', '.join([*words, *more])}."


def _command(stated: dict[str, Any]) -> str:
    """The command that makes it, as far as the provenance says; its configuration names the source, teacher and model."""
    if stated.get("command"):
        return " ".join(_without_places(str(stated["command"])).split())
    data, selection, words = stated["data"], stated["selection"], stated.get("text")
    values = {"data.image_size": data["image_size"], "data.channels": data["channels"], "data.flip": str(stated["flip"]).lower()}
    values |= {f"select.{name}": selection[name] for name in ("selector", "budget", "balance", "k", "f", "seed") if selection.get(name)}
    values["attach.text.encoder"] = words["encoder"] if words else "none"
    online = provenance.in_training(stated)
    if "vision" in online:
        values["attach.vision.encode"] = "training"
    else:
        values["attach.vision.encoder"] = stated["vision"].get("vision", {}).get("encoder", "none")
    if stated.get("vae"):
        values["vae.path"] = stated["vae"]["path"]
        values |= {"vae.encode": "training"} if "latent" in online else {}
    words = [shlex.quote(" ".join(f"{name}={place(value)}".split())) for name, value in values.items()]
    return "d2c attach CONFIG.yaml " + " ".join(words)


def _without_places(command: str) -> str:
    """A command whose local paths show their last part alone."""
    try:
        parts = shlex.split(command)
    except ValueError:  # an open quote
        parts = command.split()
    shown = []
    for part in parts:
        name, sign, value = part.partition("=") if re.match(r"[\w.+-]+=", part) else ("", "", part)
        # Within lists and mappings too, as of attach.also.
        shown.append(
            name
            + sign
            + (place(value) if _is_local(value) else re.sub(r"(?<=[\s\[{,:'\"=])[/~.][^\s,'\"\]}]+", lambda m: place(m[0]), value))
        )
    return shlex.join(shown)


def _made(stated: dict[str, Any]) -> str:
    versions = dict(stated["versions"])
    commit = versions.pop("commit", None)
    listed = ", ".join(f"{text(name)} {text(version)}" for name, version in versions.items())
    return f"Diffusion Dataset Condensation on Ray (d2c-ray): {listed}{f'; commit {code(commit)}' if commit else ''}. All of it is in `provenance.json`."


def _snippets(stated: dict[str, Any]) -> dict[str, str]:
    """Code that opens the dataset in each library and decodes a tensor of its first row."""
    kinds = tensors(stated)
    name = next(iter(stated["vision"]), "") or next(iter(kinds))
    dtype, shape, _ = kinds[name]

    def decoded(row: str) -> str:
        shaped = f"np.frombuffer({row}[{name!r}], {dtype!r}).reshape({tuple(shape)})"
        if dtype == "int8":
            scale = f"np.frombuffer({row}['{name}_scale'], 'float32').reshape({(*shape[:-1], 1)})"
            lines = [f"tokens = {shaped}", f"scale = {scale}", "tensor = tokens * scale"]
        elif dtype == "uint16":
            lines = [f"bits = {shaped}", "tensor = (bits.astype('uint32') << 16).view('float32')  # bf16 is the upper half of float32"]
        else:
            lines = [f"tensor = {shaped}"]
        return "\n".join(lines).replace("'", '"')

    images = 'data[0]["image"], data.features["label"].int2str(data[0]["label"])' if stated["class_names"] else 'data[0]["image"]'
    label = "image, name" if stated["class_names"] else "image"
    columns = ", ".join(["key", "label", *(each for each in (name, f"{name}_scale") if each in kinds)])
    return {
        "datasets": "\n".join(
            ["import os", "", "import numpy as np", "from datasets import load_dataset", "", 'data = load_dataset(os.getcwd(), split="train")', f"{label} = {images}", "row = data[0]", decoded("row")]
        ),
        "pyarrow": "\n".join(
            ["import json", "from glob import glob", "", "import numpy as np", "import pyarrow.dataset as ds", "", 'data = ds.dataset(sorted(glob("part-*.parquet")))',
             "row = data.head(1).to_pylist()[0]", decoded("row"), f'facts = data.schema.field("{name}").metadata',
             'dtype, shape = facts[b"dtype"].decode(), json.loads(facts[b"shape"])']
        ),
        "polars": "\n".join(["import numpy as np", "import polars as pl", "", 'data = pl.scan_parquet("part-*.parquet")', "row = data.head(1).collect().row(0, named=True)", decoded("row")]),
        "duckdb": "\n".join(
            ["import duckdb", "import numpy as np", "", f"data = duckdb.sql(\"select {columns} from 'part-*.parquet' order by sample_id limit 1\")",
             "row = dict(zip(data.columns, data.fetchall()[0]))", decoded("row")]
        ),
    }  # fmt: skip


def _picture_words(stated: dict[str, Any], pictured: list[int]) -> str:
    names = [stated["class_names"][label] or f"label {label}" for label in pictured if 0 <= label < len(stated["class_names"])]
    rows = f"Rows from the top: {', '.join(text(name) for name in names)}. " if names else ""
    return (
        f"{rows}Each row shows images spread evenly over what was kept{', from easy to hard' if stated['selection'].get('scores') else ''}."
    )


def _picture(folder: Path, stated: dict[str, Any], chosen: pa.Table, pictured: np.ndarray) -> bytes:
    """A class a row, its images spread evenly by rank: a PNG file."""
    labels, ids = chosen.column("label").to_numpy(), chosen.column("sample_id").to_numpy()
    ranks = pc.fill_null(chosen.column("rank"), 0).to_numpy()
    wanted: list[list[int]] = []
    for label in pictured:
        mine = np.flatnonzero(labels == label)
        mine = mine[np.lexsort((ids[mine], ranks[mine]))]
        wanted.append(ids[mine[contact_sheet.evenly(len(mine), SHOWN_IMAGES)]].tolist())
    found = _images(folder, stated, {sample_id for row in wanted for sample_id in row})
    return contact_sheet.sheet([[found[sample_id] for sample_id in row] for row in wanted])


def _images(folder: Path, stated: dict[str, Any], wanted: set[int]) -> dict[int, np.ndarray]:
    """Decoded images by sample_id, reduced where large."""
    data, found = stated["data"], {}
    for path in sorted(folder.glob("part-*.parquet")):
        if wanted.isdisjoint(tables.read(path, ["sample_id"]).column("sample_id").to_pylist()):
            continue
        with tables.opened(path, path) as file:
            for batch in file.iter_batches(256, columns=["sample_id", "image"]):
                for row, sample_id in enumerate(batch.column("sample_id").to_pylist()):
                    if sample_id in wanted:
                        content = batch.column("image")[row].as_py()["bytes"]
                        found[sample_id] = _reduced(
                            decode(content, data["image_size"], data["channels"], data.get("max_pixels", DataConfig.max_pixels))
                        )
    return found


def _reduced(pixels: np.ndarray) -> np.ndarray:
    if pixels.shape[0] <= SHOWN_PIXELS:
        return pixels
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).resize(
        (SHOWN_PIXELS, SHOWN_PIXELS), Image.Resampling.LANCZOS
    )
    return np.asarray(image).reshape(SHOWN_PIXELS, SHOWN_PIXELS, -1)
