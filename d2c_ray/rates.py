"""How fast work goes, and who says so: measured by `d2c bench` on the device that is meant, else published, else assumed.

Stages are pieces of work (`estimate.pieces`) times images. A piece's pace is, the first that there is of:

measured here   of a piece of the same shape on the same device, from bench.json in run.dir, or by a sweep's dry run just now;
                of another shape of the same kind there, by FLOPs
published       the table below, by FLOPs
assumed         a share of the device's dense peak
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from d2c_ray import estimate
from d2c_ray.config import FEATURE_SELECTORS, Config
from d2c_ray.errors import UserError
from d2c_ray.estimate import Assumed, Data, Piece
from d2c_ray.hardware import DESCRIBED, TRAININGS, Cluster, Device, kind, native_bf16
from d2c_ray.models.flops import dense_peak, known_devices

MEASURED, PUBLISHED, ASSUMED, UNKNOWN = "measured here", "published", "assumed", "not known"
FILE = "bench.json"  # in run.dir
MOST = 1e30  # no number of a bench comes near it
ON_DEMAND = "it wants a GPU and there is none: of GPUs that come on demand, --gpus says what they are"
MFU = 0.4  # assumed where nothing better is known
ALIKE = {"sample": ("forward",), "forward": ("sample",)}  # forwards of the same network
DECODES = ("score", "embed", "attach", "reference")  # stages whose images CPU tasks decode ahead of the actors
# What a stage takes besides its images, in times that Python takes to import what its workers do: starting Ray's workers, writing,
# waiting. Fitted to finished runs of the presets on two CPU cores, and so assumed elsewhere.
STARTS = {"manifest": 0.2, "teacher": 3.5, "score": 2.5, "embed": 2.0, "select": 0.2, "union": 0.1, "attach": 2.5, "train": 3.0, "sample": 1.5, "unguided": 1.5, "reference": 2.0, "evaluate": 2.0}  # fmt: skip

# The table: what others, and this project's own benches, have measured.
README = "this project's README, Measured, November 2026"
# FLOP/s of one core of an AMD EPYC with avx512_bf16: a step of a SiT of depth 6 and width 384, batch 64, 1.137 GMACs a forward with its
# head, takes two threads 1.80 s in bf16 and 3.19 / 1.27 s in fp32.
CORE = {"bf16": 6 * 1.1373e9 * 64 / 1.80 / 2, "fp32": 6 * 1.1373e9 * 64 / (3.19 / 1.27) / 2}
# On a CPU without native bf16 scoring takes 1.32 / 0.19 times as long in bf16 as in fp32, batched both.
CORE["slow bf16"] = CORE["fp32"] * 0.19 / 1.32
# Shares of a GPU's dense peak in half precision that training reaches. fast-DiT: a DiT-XL/2 (118.6 GMACs) of 256 px on cached features, AMP
# and checkpointing; an A100, 0.84 steps of 128 images a second. Such a step is counted as four forwards (`estimate.compute`).
SHARES = {
    ("A100", "bf16"): (
        0.84 * 128 * 8 * 118.64e9 / 312e12,
        "fast-DiT's README: DiT-XL/2 on one A100, recomputing, 0.84 steps/s of 128 images",
    )
}
DECODE_SEC = 0.0035  # a 500 x 375 JPEG to 256 px, a core
NOISE_SEC = 0.0009 / (16 * 4 * 32 * 32)  # a number of scoring's noise, which decode tasks draw: 16 levels of 4 x 32 x 32
DRIVER_SEC = 1 / 22_985  # a row of scores of 16 levels, which the one driver keeps however many GPUs score
START_SEC = 17 / 2.5  # of importing; 17 s from the call of scoring to its first result, less computing
RANKING_SEC = 0.65 / 1.28e6  # a row, in one partition
RANKING_CORE_SEC = (90 - 18) * 2 / 100e6  # a row and core, in several: 100M rows on two cores 90 s, 18 of them starting Ray
GREEDY_SEC = 0.10 / (100 * 1300)  # herding and k_center, a pick and image of the class
# gadc on a class of 1,300: 10 images 2.6 s, 50 10 s, 100 52 s.
GADC_SEC, GADC_POWER = 2.6 / (10**1.25 * 1300), 1.25
# Precision to coverage of 50,000 generated against 10,000 real images 298 s, copies 66 s, a Fréchet distance 3.6 s, at 2,048 numbers.
COMPARING_SEC, FRECHET_SEC = (298 + 66) / (50_000 * 10_000), 3.6
LISTING_SEC, PARQUET_SEC = 5e-5, 1.24e-6  # an image; assumed; of Parquet on a local disk
MOST_COMPARED = 50_000  # rows of the reference


@dataclass(frozen=True)
class Rate:
    """Seconds of one process, and who says so: `source` is MEASURED, PUBLISHED, ASSUMED or UNKNOWN, `said` where it is from."""

    seconds: float
    source: str
    said: str


@dataclass(frozen=True)
class Time:
    """What a stage takes.

    Attributes:
        seconds: from its start to its end; None: not known. parts: (what of it, seconds, who says so).
    """

    seconds: float | None
    parts: list[tuple[str, float, Rate]]

    @property
    def by(self) -> Rate:
        """Who says so of the largest part."""
        unknown = next((rate for _, _, rate in self.parts if rate.source == UNKNOWN), None)
        return unknown or max(self.parts, key=lambda part: part[1])[2]


@dataclass
class Rates:
    """All that is known of paces.

    Attributes:
        entries: measured ones, as `bench` writes them. mfu: the share of a GPU's peak that the user assumes; None: as the table has it.
        assumed: what was assumed of shapes on the way.
    """

    entries: list[dict[str, Any]]
    mfu: float | None = None
    assumed: Assumed = field(default_factory=list)

    def piece(self, piece: Piece, device: Device) -> Rate:
        """One piece of work in one process on a device."""
        if piece.flops == 0:
            return Rate(0.0, ASSUMED, "nothing to do")
        if device.gpu and not device.name:
            return Rate(0.0, UNKNOWN, ON_DEMAND)
        mine = [
            entry for entry in self.entries
            if entry["what"] in (piece.what, *ALIKE.get(piece.what, ())) and device.is_same(entry["device"], entry["gpu"]) and (device.gpu or entry["threads"] == device.threads)
        ]  # fmt: skip
        for entry in mine:
            if (entry["what"], entry["shape"]) == (piece.what, piece.shape):
                return Rate(entry["seconds"], MEASURED, f"{_where(entry)}{_taken(entry, device)}")
        alike = [entry for entry in mine if entry["precision"] == piece.precision and entry["flops"]]
        if alike and piece.flops:
            near = min(alike, key=lambda entry: (entry["what"] != piece.what, abs(entry["flops"] - piece.flops)))
            said = f"{_where(near)}{_taken(near, device)}, of another shape ({near['shape']}) by FLOPs"
            return Rate(near["seconds"] * piece.flops / near["flops"], MEASURED, said)
        if piece.flops is None:
            return Rate(0.0, UNKNOWN, f"the FLOPs of {piece.shape} are not known: d2c bench measures it where its weights are at hand")
        return self._by_flops(piece.flops, piece.precision, device, piece.what == "train")

    def _by_flops(self, flops: float, precision: str, device: Device, trains: bool) -> Rate:
        if not device.gpu:
            own = "fp32" if precision != "bf16" else "bf16" if native_bf16() else "slow bf16"
            threads = min(device.threads, device.cores or device.threads)
            said = f"{README}: an AMD EPYC reaches {CORE[own] / 1e12:.3f} TFLOP/s a core in {precision}"
            return Rate(flops / CORE[own] / threads, PUBLISHED, said + (" where it has to be emulated" if own == "slow bf16" else ""))
        peak = dense_peak(device.name, precision)
        if peak is None:
            return Rate(0.0, UNKNOWN, f"no peak in {precision} is known of {device.name}: d2c bench measures it where it is at hand")
        name, top = peak
        share, source, said = self.mfu or MFU, ASSUMED, f"{self.mfu or MFU:.0%} of {name}'s {top / 1e12:,.1f} TFLOP/s in {precision}"
        if trains and not self.mfu and (name, "bf16" if precision == "fp16" else precision) in SHARES:
            share, where = SHARES[name, "bf16" if precision == "fp16" else precision]
            source, said = PUBLISHED, f"{where}: {share:.0%} of its {top / 1e12:,.1f} TFLOP/s"
        return Rate(flops / (top * share), source, said)

    def image(self, stage: str, config: Config, data: Data, device: Device) -> list[tuple[str, Rate]]:
        """Seconds of an image in one process, by piece."""
        found = []
        for piece in estimate.pieces(stage, config, data, self.assumed):
            rate = self.piece(piece, device)
            found.append((piece.what, Rate(rate.seconds * piece.times, rate.source, rate.said)))
        return found

    def _on(self, what: str, cluster: Cluster) -> list[dict[str, Any]]:
        """What was measured of a machine's cores: the cluster's or, where they are not known, one's that has its GPU."""

        def is_mine(entry: dict[str, Any]) -> bool:
            return (
                entry["device"] == cluster.cpu
                if cluster.cpu
                else bool(cluster.gpu) and Device(cluster.gpu, True).is_same(entry["host_gpu"], True)
            )

        return [entry for entry in self.entries if entry["what"] == what and is_mine(entry)]

    def host(self, what: str, shape: str, cluster: Cluster) -> Rate | None:
        """Work of a core that is no piece of a stage."""
        for entry in self._on(what, cluster):
            if entry["shape"] == shape:
                return Rate(entry["seconds"], MEASURED, _where(entry))
        return None

    def start(self, cluster: Cluster) -> Rate:
        """Starting Python with all that a worker imports."""
        return self.host("start", "", cluster) or Rate(START_SEC, PUBLISHED, f"{README}: 17 s until a stage's first result")

    def decode(self, config: Config, cluster: Cluster) -> Rate:
        """An image on one core."""
        said = f"{README}: a JPEG of 500 x 375 to 256 px"
        return self.host("read", reading(config), cluster) or Rate(DECODE_SEC, PUBLISHED, said)

    def noise(self, config: Config, data: Data) -> float:
        """Seconds a core of drawing an image's noise, which is part of decoding for scoring."""
        spec = estimate.teacher_spec(config, data.classes, self.assumed)
        return NOISE_SEC * config.score.num_timesteps * spec.channels * spec.input_size**2

    def stage(self, stage: str, config: Config, data: Data, cluster: Cluster, share: int) -> Time:
        """A whole stage on `share` places, actors or training workers, that are taken to share it evenly."""
        count, device = estimate.images(stage, config, data), cluster.device(stage, config.resources)
        if not device.gpu:
            device = replace(device, cores=max(1, cluster.cpus // max(1, share)))
        start = self.start(cluster)
        started = STARTS["manifest" if stage == "teacher" and config.teacher.checkpoint else stage]  # one that is there is only looked at
        fitted = Rate(
            start.seconds, ASSUMED, f"as many times importing as was fitted to runs of the presets ({start.source}: {start.said})"
        )
        parts = [("starting", start.seconds * started, fitted)]
        # Actors that share a GPU share its pace.
        whole = share * (min(1.0, cluster.gpus_per_actor(config.resources)) if device.gpu and stage not in TRAININGS else 1.0)
        parts += [(what, count * rate.seconds / whole, rate) for what, rate in self.image(stage, config, data, device)]
        if stage in DECODES:
            each = self.decode(config, cluster)
            if stage == "score":
                each = replace(each, seconds=each.seconds + self.noise(config, data))
            if device.gpu:  # ahead of the actors, who wait for what is longer
                ahead, computing = count * each.seconds / max(1, cluster.cpus - share), sum(seconds for what, seconds, _ in parts[1:])
                parts.append(("waiting for decoding", max(0.0, ahead - computing), each))
            else:  # on the same cores
                parts.append(("decoding", count * each.seconds / share, each))
        if stage == "score":
            kept, working = count * DRIVER_SEC, sum(seconds for _, seconds, _ in parts[1:])
            one = Rate(DRIVER_SEC, PUBLISHED, f"{README}: one driver keeps {1 / DRIVER_SEC:,.0f} rows a second")
            parts.append(("waiting for the driver", max(0.0, kept - working), one))
        parts += self._tables(stage, config, data, cluster, share)
        unknown = any(rate.source == UNKNOWN for _, _, rate in parts) and count > 0
        return Time(
            None if unknown else sum(seconds for _, seconds, _ in parts),
            parts if unknown else [part for part in parts if part[2].source != UNKNOWN],
        )

    def _tables(self, stage: str, config: Config, data: Data, cluster: Cluster, share: int) -> list[tuple[str, float, Rate]]:
        """Work on tables, on the driver or in tasks of a core each."""
        if stage == "manifest":
            if _is_parquet(config) and not config.data.path.startswith("s3://"):
                rate = Rate(PARQUET_SEC, PUBLISHED, f"{README}, At scale: Parquet on a local disk")
            else:
                rate = Rate(LISTING_SEC, ASSUMED, "20,000 images a second; it depends on the storage")
            return [("listing", data.images * rate.seconds, rate)]
        if stage == "select":
            return [self._choosing(config, data, cluster, share)]
        if stage == "evaluate":
            made, total = config.sample.num_images, 0.0
            rate = Rate(0.0, PUBLISHED, f"{README}: measuring")
            real = min(estimate.images("reference", config, data), max(MOST_COMPARED, made))
            for piece in estimate.networks(config):
                width = estimate.network_width(piece.of, self.assumed) / 2048
                own = self._comparing(piece.of, made, real, cluster)
                total += own.seconds if own else COMPARING_SEC * made * real * width + FRECHET_SEC * width**3
                rate = own or rate
            times = 2 if config.evaluate.unguided and config.sample.guidance != 1.0 else 1
            return [("comparing", times * total, rate)]
        return []

    def _choosing(self, config: Config, data: Data, cluster: Cluster, share: int) -> tuple[str, float, Rate]:
        """Of scores by the driver or, of more than it ranks at once, by tasks on all cores; of features class by class on the stage's places."""
        select, classes = config.select, max(1, data.classes)
        picks, of_class, said = estimate.images("attach", config, data) / classes, data.images / classes, f"{README}: selecting"
        if select.selector not in FEATURE_SELECTORS:
            seconds = data.images * RANKING_SEC
            if select.selector != "all" and data.images > config.resources.rows_per_partition:
                seconds = data.images * RANKING_CORE_SEC / max(1, cluster.cpus)
            return "choosing", seconds, Rate(seconds, PUBLISHED, said)
        each = GADC_SEC * max(1.0, picks) ** GADC_POWER * of_class if select.selector == "gadc" else GREEDY_SEC * picks * of_class
        seconds = -(-classes // max(1, min(share, classes))) * each
        if select.selector != "gadc" or not cluster.gpus_per_actor(config.resources):
            return "choosing", seconds, Rate(seconds, PUBLISHED, said)
        if not cluster.gpus:
            return "choosing", 0.0, Rate(0.0, UNKNOWN, ON_DEMAND)
        return "choosing", seconds, Rate(seconds, ASSUMED, f"as long on a GPU as on a core ({said})")

    def _comparing(self, network: str, made: int, real: int, cluster: Cluster) -> Rate | None:
        """Measures of features, in proportion to what was measured of fewer, or of more."""
        for entry in self._on("comparing", cluster):
            if entry["shape"].startswith(f"{network},"):
                more = max(1.0, made / entry["made"]) * max(1.0, real / entry["real"])
                return Rate(entry["seconds"] * more, MEASURED, _where(entry))
        return None


def _where(entry: dict[str, Any]) -> str:
    return f"{entry['device']}, {entry['date'][:10]}"


def _taken(entry: dict[str, Any], device: Device) -> str:
    return f", which the cluster's {device.name} is taken to be" if device.is_taken_for(entry["device"], entry["gpu"]) else ""


def _is_parquet(config: Config) -> bool:
    """Whether the images are known to come as Parquet, without looking."""
    data = config.data
    return data.source in ("parquet", "digits") or (
        data.source == "auto" and (data.path.endswith(".parquet") or data.pattern.endswith(".parquet"))
    )


def reading(config: Config) -> str:
    """What the pace of decoding depends on, in words."""
    data = config.data
    where = data.path.rstrip("/").rpartition("/")[2] or data.source
    return f"images of {where} to {data.image_size} px, {data.channels} channels"


def read(folder: Path) -> list[dict[str, Any]]:
    """What was measured, from bench.json in a run.dir; empty where it is not there.

    Raises:
        UserError: a file that is none of `d2c bench`.
    """
    path = folder.expanduser() / FILE
    return from_file(path) if path.is_file() else []


def from_file(path: Path) -> list[dict[str, Any]]:
    """The entries of a file that `d2c bench` wrote.

    Raises:
        UserError: another file.
    """
    try:
        found = json.loads(path.read_text())["entries"]
        wrong = next((f"entry {number}: {said}" for number, entry in enumerate(found) if (said := _wrong(entry))), "")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        raise UserError(f"'{path}' is no file of d2c bench ({wrong}); d2c bench writes it anew once it is moved away.")
    return list(found)


def _wrong(entry: Any) -> str:
    """What an entry lacks or has of another kind; empty: nothing."""
    if not isinstance(entry, dict):
        return f"{entry!r:.40} is no mapping"
    for name, (is_right, words) in FIELDS.items():
        if name in ("made", "real") and entry.get("what") != "comparing":
            continue
        if name not in entry:
            return f"{name} is missing"
        if not is_right(entry[name]):
            return f"{name} is {entry[name]!r:.40}; {words} would do"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < MOST


def _is_count(value: Any) -> bool:
    return _is_number(value) and isinstance(value, int)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


# What an entry of bench.json has, which a person may have edited: how it is told, and in words.
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("what", "shape", "device", "host_gpu", "precision", "date"), (_is_text, "a text")),
    "gpu": (lambda value: isinstance(value, bool), "true or false"), "threads": (_is_count, "a number above 0"), "seconds": (_is_number, "a number above 0"),
    "flops": (lambda value: value is None or value == 0 or _is_number(value), "a number or null"), "made": (_is_count, "a number above 0"), "real": (_is_count, "a number above 0"),
}  # fmt: skip


def of(config: Config, mfu: float | None = None) -> Rates:
    """What is known where a configuration's runs lie.

    Raises:
        UserError: a utilisation that is no share, or a bench.json that is none.
    """
    if mfu is not None and not 0.0 < mfu <= 1.0:
        raise UserError(f"--mfu {mfu}: the share of the peak that is used; above 0 and up to 1 would do, for example 0.4.")
    return Rates(read(Path(config.run.dir)), mfu)


def check(cluster: Cluster, config: Config, rates: Rates) -> None:
    """Refuses a described GPU that nothing is known of; of one at hand the hours are then not known.

    Raises:
        UserError: names it, and what would do.
    """
    precision = config.train.precision
    measured = any(Device(cluster.gpu, True).is_same(entry["device"], entry["gpu"]) for entry in rates.entries)
    if cluster.how == DESCRIBED and cluster.gpu and not measured and dense_peak(cluster.gpu, precision) is None:
        would = f"one of {', '.join(known_devices())} would do" if kind(cluster.gpu) is None else "another train.precision would do"
        raise UserError(f"--gpus {cluster.gpu}: no peak in {precision} is known of it, and d2c bench measured nothing on one; {would}.")
