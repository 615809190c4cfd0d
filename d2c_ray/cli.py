"""The command line: parse, call, print. Imports nothing heavy before a command runs."""

import select
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from d2c_ray import logs
from d2c_ray.errors import Stopped, UserError
from d2c_ray.wording import redacted, shown

COMMANDS = {
    "run": (
        "Run the whole pipeline, from the images to the report; the same command again goes on where it stopped.",
        "d2c run configs/quickstart.yaml select.budget=500",
    ),
    "manifest": (
        "List every image of the source with its label and where its bytes are.",
        "d2c manifest configs/cifar10.yaml data.path=/data/cifar10",
    ),
    "teacher": (
        "Train (or check) the model that judges how hard each image is.",
        "d2c teacher configs/quickstart.yaml teacher.train.num_images=64000",
    ),
    "score": (
        "Score every image's difficulty, and say how stable the ranks are.",
        "d2c score configs/quickstart.yaml score.num_timesteps=32",
    ),
    "select": ("Choose the images of the subset.", "d2c select configs/quickstart.yaml select.budget=0.1 select.f=0.7"),
    "selectors": (
        "Compare what the selectors choose at the same budget, without training: coverage, overlap, balance, difficulty.",
        "d2c selectors configs/quickstart.yaml --only interval,random,gadc",
    ),
    "explain": (
        "Say why an image is in the subset or not: its score, its errors by timestep, its rank and neighbours.",
        "d2c explain configs/quickstart.yaml digits.parquet#000000042",
    ),
    "embed": (
        "Embed every image in the frozen feature space that herding, k_center and gadc select in.",
        "d2c embed configs/cifar10.yaml embed.encoder=efficientnet-lite0",
    ),
    "attach": (
        "Make the condensed dataset: text states, vision tokens and latents of the chosen images.",
        "d2c attach configs/quickstart.yaml",
    ),
    "verify": (
        "Check a condensed dataset: its files against their hashes, images, flips, and the tensors against the encoders.",
        "d2c verify configs/quickstart.yaml --images 0",
    ),
    "export": (
        "Write the images of a condensed dataset as WebDataset tars, class folders or a list of keys.",
        "d2c export configs/quickstart.yaml webdataset shards",
    ),
    "train": ("Train the students on their condensed datasets.", "d2c train configs/quickstart.yaml train.align_weight=0.5"),
    "sample": ("Generate images with the trained students.", "d2c sample configs/quickstart.yaml sample.guidance=2"),
    "evaluate": (
        "Measure the images, beside the floor and what real images score; or anybody's, with --reference.",
        "d2c evaluate configs/quickstart.yaml",
    ),
    "compare": (
        "Set the students of several runs side by side; refused, with the field's name, where they were not measured alike.",
        "d2c compare configs/quickstart.yaml configs/cifar10_small.yaml",
    ),
    "report": ("Run whatever is missing and write report.html.", "d2c report configs/quickstart.yaml"),
    "sweep": (
        "Try budgets, selectors, strengths, whatever field: every point with several seeds, what they share made once.",
        "d2c sweep configs/sweep_digits.yaml sweep.seeds=[0,1,2,3,4]",
    ),
    "submit": (
        "Run the pipeline, one stage or a sweep as a job on a Ray cluster: upload this folder, follow the log, exit as the job did.",
        "d2c submit configs/imagenet256_sit_l_10k.yaml data.path=s3://bucket/imagenet data.classes=wordnet run.dir=/shared/runs",
    ),
    "status": (
        "Say how far a run is, from its folder alone (local, or a copy on s3://): no cluster is asked.",
        "d2c status configs/quickstart.yaml",
    ),
    "import-model": (
        "Make a model folder of published DiT or SiT weights, which can be sampled, scored with and fine-tuned.",
        "d2c import-model DiT-XL-2-256x256.pt models/dit-xl --kind dit",
    ),
    "export-model": (
        "Write a trained student (or a model folder) as a diffusers pipeline, which loads where this tool is not installed.",
        "d2c export-model configs/quickstart.yaml exported --weights ema",
    ),
    "plan": (
        "Say what a configuration will cost before anything runs: stages, hours, GPU-hours, price, bytes, memory, and what does not fit.",
        "d2c plan configs/imagenet256_sit_l_10k.yaml resources.train_workers=8 --gpus 8xH100",
    ),
    "bench": (
        "Measure how fast this machine does what a run is made of, in minutes; d2c plan then counts with that.",
        "d2c bench configs/quickstart.yaml",
    ),
    "config": ("Print the whole configuration as it would run, defaults included.", "d2c config configs/cifar10.yaml train.lr=2e-4"),
}

# Commands that run up to one stage, with a configuration and nothing else.
STAGES = ("manifest", "teacher", "score", "select", "embed", "attach", "train", "sample", "report")
STAGE_COMMANDS = ["run", "evaluate", "sweep", *STAGES]  # that take a configuration alone, and so can be jobs
STOPPED = 143  # exit status as of a process that SIGTERM ended; of `d2c submit`, of a job that was stopped

# Keys of the section evaluate that say how a run is measured and mean nothing to images from elsewhere, and what would do.
NOT_OF_IMAGES = {
    "evaluate.reference": "--reference, which takes statistics (an .npz with mu and sigma) as well as images, would do",
    "evaluate.unguided": "how they were sampled is not known; those made without guidance, measured by a command of their own, would do",
    "evaluate.max_reference": "all of --reference is measured against; a set of fewer images would do",
}


class _Commands(TyperGroup):
    """Commands among which a broken pipe ends one without a word only where it is its own output's, as of `d2c status RUN | head`."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            if any(map(_unread, (1, 2))):
                raise
            raise RuntimeError("a process that this one talks to has ended") from error


def _unread(descriptor: int) -> bool:
    """Whether a pipe that this process writes to has no reader any more."""
    asked = select.poll()
    asked.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in asked.poll(0))


# Plain help: typer's own layout imports rich, which takes longer than everything else together.
app = typer.Typer(
    name="d2c",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Diffusion Dataset Condensation on Ray: choose the few percent of a dataset that train a diffusion transformer, attach what "
    "helps it learn, train it, and say honestly what that bought.",
    epilog="\b\nExamples:\n" + "\n".join(f"  {example}" for _, example in COMMANDS.values()),
)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of what differs from the defaults; see configs/.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes on top of the file, for example select.budget=500.")
]


def _not_empty(would: str) -> Callable[[typer.Context, typer.CallbackParam, str], str]:
    """Refuses an option that is given without a word, which would be taken for one that is not given."""

    def check(context: typer.Context, option: typer.CallbackParam, value: str) -> str:
        given = context.get_parameter_source(option.name or "")
        if given is not None and given.name == "COMMANDLINE" and not value.strip():
            raise UserError(f"{option.opts[0]} is empty, as of a variable that is not set; {would}.")
        return value

    return check


Gpus = Annotated[
    str,
    typer.Option(
        "--gpus", "--gpu", metavar="NxNAME", help="A cluster in words: 8xH100, A100, '2xRTX 4090'; else this machine.",
        callback=_not_empty("8xH100 would do, or the command without it, which is of this machine"),
    ),
]  # fmt: skip
Cpus = Annotated[int, typer.Option(min=0, metavar="N", help="CPU cores of that cluster; 0: 8 a GPU.")]
Address = Annotated[
    str,
    typer.Option(
        metavar="ADDRESS", help="A Ray cluster at hand, which is asked for its nodes: auto, HOST:PORT.",
        callback=_not_empty("auto or HOST:PORT would do, or the command without it, which is of this machine"),
    ),
]  # fmt: skip


def _command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a command with its line of `COMMANDS`, and its example below its help."""
    summary, example = COMMANDS[name]
    needs = "\n\nRuns what it needs first and is not there yet." if name in (*STAGES, "evaluate", "selectors", "explain") else ""
    if name in ("verify", "export"):
        needs = "\n\nTakes a condensed-<hash> folder, or the configuration of a run, which makes the dataset first if it is not there yet."
    if name == "submit":
        needs = (
            "\n\nThe configuration is checked here before anything is uploaded. run.dir must be an absolute path on storage that every node "
            "sees: the job works in Ray's own copy of this folder. Exit status: 0 the job succeeded, its own where it failed, 143 it was stopped, "
            "130 after Ctrl-C (the job goes on), 2 nothing was submitted, 1 the cluster or the job was lost. The same command again goes on where the run stopped."
        )
    if name == "evaluate":
        needs += (
            " Given images instead of a configuration (a folder, an .npz with arr_0 as ADM's evaluator reads it, Parquet or a samples-* folder) "
            "it measures them against those of --reference, without Ray: d2c evaluate samples/ --reference real/. "
            "Changes are then of the section evaluate alone, for example evaluate.bootstrap=100."
        )
    return app.command(name, help=summary + needs, short_help=summary, epilog=f"\b\nExample:\n  {example}")


Condensed = Annotated[str, typer.Argument(metavar="FOLDER|CONFIG", help="A condensed dataset, or the YAML file of its run.")]


def _stage_command(stage: str) -> Callable[..., None]:
    def command(config: ConfigPath, overrides: Overrides = None) -> None:
        _run(config, overrides, stage)

    return command


@_command("run")
def run(config: ConfigPath, overrides: Overrides = None) -> None:
    _run(config, overrides, "report")


for _name in STAGES:
    _command(_name)(_stage_command(_name))


@_command("selectors")
def selectors(
    config: ConfigPath,
    overrides: Overrides = None,
    only: Annotated[str, typer.Option(metavar="NAMES", help="Selectors to compare, separated by commas; all of them otherwise.")] = "",
) -> None:
    from d2c_ray import pipeline

    base = _load(config, overrides)
    found, out = pipeline.compare_selectors(base, [name.strip() for name in only.split(",") if name.strip()], say=_say)
    from d2c_ray.report.selectors import print_comparison

    print_comparison(found, out)


@_command("explain")
def explain(
    config: ConfigPath, key: Annotated[str, typer.Argument(metavar="KEY", help="The image's key, or its end.")], overrides: Overrides = None
) -> None:
    from d2c_ray import pipeline

    plan = pipeline.finished(_load(config, overrides), "select", say=_say)
    from d2c_ray.report import explain

    print(shown("\n".join(explain.lines(plan, key))))


@_command("verify")
def verify(
    condensed: Condensed,
    overrides: Overrides = None,
    images: Annotated[int, typer.Option(min=0, metavar="N", help="Images, spread evenly, to decode and encode anew; 0: all of them.")] = 32,
) -> None:
    folders = _condensed(condensed, overrides)
    from d2c_ray.data.verify import check

    wrong = False
    for folder in dict.fromkeys(folders.values()):
        found = check(folder, images)
        for note in found.notes:
            print(f"note: {shown(note)}")
        for fault in found.faults:
            print(f"wrong: {shown(fault)}")
        print(f"{f'{len(found.faults)} wrong' if found.faults else 'all right'}: {folder}: {shown(found.summary())}")
        wrong |= bool(found.faults)
    if wrong:
        sys.exit(2)


@_command("export")
def export(
    condensed: Condensed,
    form: Annotated[str, typer.Argument(metavar="FORM", help="webdataset | folders | ids (a key a line; a table where OUT ends in .csv).")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write, or file of ids. Nothing is written over.")],
    overrides: Overrides = None,
    arm: Annotated[str, typer.Option(metavar="NAME", help="Which student's dataset, where the run has several.")] = "",
    per_shard: Annotated[int, typer.Option(metavar="N", help="webdataset: images a tar, at most.")] = 10_000,
) -> None:
    folders = _condensed(condensed, overrides)
    from d2c_ray.data.export import export

    count = export(_of_arm(folders, arm, "condensed datasets"), form, out, per_shard)
    print(f"{count:,} images: {out}")


def _condensed(given: str, overrides: list[str] | None) -> dict[str, str]:
    """The condensed datasets meant, by arm: of a folder, or of a configuration's run."""
    from pathlib import Path

    if Path(given).is_dir() or not given.lower().endswith((".yaml", ".yml")):
        if overrides:
            raise UserError(f"'{given}' is a folder, to which {overrides[0]} means nothing; changes go with a configuration file.")
        return {"": given}
    from d2c_ray import pipeline

    plan = pipeline.finished(_load(given, overrides), "attach", say=_say)
    return {name: str(nodes["attach"].folder) for name, nodes in plan.arms.items()}


@_command("evaluate")
def evaluate(
    given: Annotated[str, typer.Argument(metavar="CONFIG|IMAGES", help="The YAML file of a run, or images: a folder, .npz or .parquet.")],
    overrides: Overrides = None,
    reference: Annotated[
        str, typer.Option(metavar="IMAGES", help="Images: the real ones to measure against, or an .npz of statistics (mu, sigma).")
    ] = "",
    network: Annotated[
        str, typer.Option(metavar="NAME", help="efficientnet-lite2 (the default: needs no download), inception for FID, dinov2-l, ...")
    ] = "",
    more_networks: Annotated[str, typer.Option(metavar="NAMES", help="To measure in as well, separated by commas.")] = "",
    train: Annotated[str, typer.Option(metavar="IMAGES", help="The images that were trained on: for the floor, and for copying.")] = "",
    mirror: Annotated[
        bool, typer.Option("--mirror/--no-mirror", help="Whether a copy of a mirrored training image is one: training may have had flips.")
    ] = True,
    held_out: Annotated[
        str, typer.Option(metavar="IMAGES|N", help="Real images measured beside: a set of them, or so many taken out of the reference.")
    ] = "",
    size: Annotated[
        int, typer.Option(min=0, metavar="PIXELS", help="Centre crop of all images, as ADM's; 0: as they are, the network resizes.")
    ] = 0,
    batch: Annotated[int, typer.Option(min=0, metavar="N", help="Images a forward; 0: 32.")] = 0,
    max_pixels: Annotated[
        int, typer.Option(min=0, metavar="N", help="Images of more pixels are left out; 0: 50,000,000. Four are in memory at once.")
    ] = 0,
    save_statistics: Annotated[
        str, typer.Option(metavar="FILE", help="An .npz for the reference's statistics in the network, which --reference takes.")
    ] = "",
    out: Annotated[str, typer.Option(metavar="FILE", help="A .json for the numbers with their record, which d2c compare reads.")] = "",
) -> None:
    own = {
        "--reference": reference, "--network": network, "--more-networks": more_networks, "--train": train, "--no-mirror": not mirror, "--held-out": held_out,
        "--size": size, "--batch": batch, "--max-pixels": max_pixels, "--save-statistics": save_statistics, "--out": out,
    }  # fmt: skip
    if given.lower().endswith((".yaml", ".yml")):
        wrong = next((option for option, value in own.items() if value), None)
        if wrong:
            raise UserError(f"{wrong} is of images; a configuration says it itself, for example evaluate.network=efficientnet-lite0.")
        _run(given, overrides, "evaluate")
        return
    if not reference:
        raise UserError(f"'{given}' is measured against real images: --reference, a folder, an .npz or .parquet of them, is missing.")
    if not mirror and not train:
        raise UserError("--no-mirror is of the images that were trained on: --train, a set of them, is missing.")
    for option, file, ending in (("--out", out, ".json"), ("--save-statistics", save_statistics, ".npz")):
        if file and not file.endswith(ending):
            raise UserError(f"{option} {file}: a file that ends in {ending} would do.")
        if file:
            _writable(option, file)
    for override in overrides or []:
        key = override.partition("=")[0]
        if key in NOT_OF_IMAGES:
            raise UserError(f"'{override}' does nothing to images that belong to no run: {NOT_OF_IMAGES[key]}.")
    values = {
        "network": network,
        "device_batch": batch,
        "more_networks": [name.strip() for name in more_networks.split(",") if name.strip()],
    }
    from d2c_ray.config import evaluate_options

    options = evaluate_options(overrides or [], {key: value for key, value in values.items() if value})
    from d2c_ray.report import image_sets

    found = image_sets.evaluate(
        given,
        reference,
        options,
        train=train,
        held_out=held_out,
        mirror=mirror,
        size=size,
        max_pixels=max_pixels,
        save_statistics=save_statistics,
    )
    print(shown("\n".join(image_sets.lines(found))))
    if save_statistics:
        print(f"statistics of the reference in {found['record']['network']}: {save_statistics}")
    if out:
        from pathlib import Path

        from d2c_ray.rundir import write_json

        write_json(Path(out).expanduser(), found)
        print(f"record: {out}")


def _writable(option: str, file: str) -> None:
    """Refuses a file that cannot be written, before anything is measured for it."""
    import tempfile
    from pathlib import Path

    path = Path(file).expanduser().absolute()
    if path.is_dir():
        raise UserError(f"{option} {file}: there is a folder of that name; a file would do.")
    there = next(parent for parent in path.parents if parent.exists())
    if not there.is_dir():
        raise UserError(f"{option} {file}: '{there}' is no folder; a file in one would do.")
    try:  # what is allowed says too little, and to root nothing
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(
            f"{option} {file}: nothing can be written to '{there}' ({error.strerror}); a file in a folder of yours would do."
        ) from None


@_command("compare")
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...", help="Finished runs: their folders or YAML files; or eval-* folders, or .json of d2c evaluate --out."
        ),
    ],
    anyway: Annotated[bool, typer.Option("--anyway", help="Show numbers that were not measured alike, under their differences.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The numbers alone, as JSON.")] = False,
) -> None:
    from d2c_ray.report import compare

    found = compare.compare(compare.gather(runs), anyway)
    if as_json:
        import json

        print(json.dumps(compare.to_json(found), indent=1))
    else:
        print(shown("\n".join(compare.lines(found))))


@_command("sweep")
def sweep(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run, and the hours and bytes that it takes; run nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run, the numbers alone, as JSON.")] = False,
    gpus: Gpus = "",
    cpus: Cpus = 0,
    address: Address = "",
) -> None:
    from d2c_ray import sweep as sweeps
    from d2c_ray.report import outcomes
    from d2c_ray.report import sweep as report

    wanted = next((option for option, value in (("--gpus", gpus), ("--cpus", cpus), ("--address", address)) if value), "")
    if wanted and not dry_run:
        raise UserError(f"{wanted} is of a dry run; a sweep runs where resources.address says. --dry-run with it would do.")
    base = _load(config, overrides)
    if dry_run:
        found = sweeps.forecast(base, _cluster(base, gpus, cpus, address))
        if as_json:
            import json

            print(json.dumps(found, indent=1))
        else:
            print(shown("\n".join(report.forecast_lines(found))))
        return
    try:
        done = sweeps.run(base, say=_say)
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on from here.")
        sys.exit(130)
    with logs.results():
        report.show(base, done.folder, outcomes.gather(done.folder, base))


@_command("submit")
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="The cluster: http://HEAD:8265, or HEAD:PORT of its GCS; else RAY_ADDRESS, else this machine's own.",
            callback=_not_empty("http://HEAD:8265 would do, or the command without it, which takes RAY_ADDRESS or this machine's own"),
        ),
    ] = "",
    stage: Annotated[str, typer.Option(metavar="COMMAND", help="What of d2c the job runs: run, a stage, or sweep.")] = "run",
    working_dir: Annotated[str, typer.Option(metavar="FOLDER", help="What is uploaded, and where the job runs.")] = ".",
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Files not to upload, as in a .gitignore, besides those of .gitignore and .rayignore."),
    ] = None,
    submission_id: Annotated[str, typer.Option(metavar="NAME", help="Of the job; Ray takes each once.")] = "",
    metadata: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="More of it, kept with the job.")] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not follow the job.")] = False,
) -> None:
    if stage not in STAGE_COMMANDS:
        from d2c_ray.wording import nearest

        raise UserError(f"--stage {stage}: one of {', '.join(STAGE_COMMANDS)} would do{nearest(stage, STAGE_COMMANDS)}")
    from d2c_ray.distributed import submit as jobs

    job = jobs.prepare(config, overrides or [], stage, working_dir, exclude or [], metadata or [])
    sys.exit(jobs.submit(job, address, submission_id, not no_wait, _say))


@_command("status")
def status(
    run: Annotated[str, typer.Argument(metavar="RUN|CONFIG", help="A run folder or a sweep's, local or s3://; or the run's YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="As the run was given; of a folder storage.* alone (storage.endpoint)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All of it, as JSON.")] = False,
) -> None:
    from d2c_ray.config import load
    from d2c_ray.report import status
    from d2c_ray.rundir import run_folder

    if run.lower().endswith((".yaml", ".yml")):
        given = load(run, overrides or [])
        run = str(run_folder(given))
    else:
        wrong = next((override for override in overrides or [] if not override.startswith("storage.")), "")
        if wrong:
            raise UserError(
                f"'{run}' is a folder, to which {wrong} means nothing; storage.* alone does, or changes with a configuration file."
            )
        given = load(None, overrides or [])
    found = status.read(run, given.storage)
    if as_json:
        import json

        print(json.dumps(found, indent=1))
    else:
        print(shown("\n".join(status.lines(found))))


@_command("import-model")
def import_model(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A .pt or .safetensors file, or the folder or hub name of a diffusers DiT pipeline.")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write. Nothing is written over.")],
    kind: Annotated[str, typer.Option(metavar="KIND", help="dit or sit, where the file does not say it.")] = "",
    heads: Annotated[
        int, typer.Option(min=0, metavar="N", help="Of attention; 0: the published 64 channels a head, or 16 heads at a width of 1152.")
    ] = 0,
    classes: Annotated[str, typer.Option(metavar="FILE", help="Text file of class names, line i for class i.")] = "",
    path: Annotated[str, typer.Option(metavar="PATH", help="Of a sit: linear, as the published ones, or cosine.")] = "linear",
) -> None:
    for option, value, known in (("--kind", kind, ("", "dit", "sit")), ("--path", path, ("linear", "cosine"))):
        if value not in known:
            raise UserError(f"{option} {value}: {' or '.join(filter(None, known))} would do.")
    from d2c_ray.models import published

    spec = published.import_model(file, out, kind, heads, classes, path)
    print(f"{spec.kind}, depth {spec.depth}, width {spec.width}, {spec.heads} heads, patch {spec.patch}, {spec.num_classes} classes: {out}")


@_command("export-model")
def export_model(
    model: Annotated[
        str, typer.Argument(metavar="FOLDER|CONFIG", help="A model folder, or the YAML file of its run, which trains it first if need be.")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write. Nothing is written over.")],
    overrides: Overrides = None,
    weights: Annotated[str, typer.Option(metavar="WHICH", help="ema, raw, or ema-DECAY of train.ema_also.")] = "ema",
    arm: Annotated[str, typer.Option(metavar="NAME", help="Which student, where the run has several.")] = "",
    vae: Annotated[
        str, typer.Option(metavar="PATH", help="Its AutoencoderKL, a folder or hub name; of a run that of the configuration.")
    ] = "",
) -> None:
    from pathlib import Path

    from d2c_ray.config import VaeConfig

    own = VaeConfig(path=vae)
    if model.lower().endswith((".yaml", ".yml")):
        from d2c_ray import pipeline

        plan = pipeline.finished(_load(model, overrides), "train", say=_say)
        folders = {name: str(nodes["train"].folder / "model") for name, nodes in plan.arms.items()}
        folder, own = Path(_of_arm(folders, arm, "students")), own if vae else plan.config.vae
    else:
        if overrides:
            raise UserError(f"'{model}' is a folder, to which {overrides[0]} means nothing; changes go with a configuration file.")
        folder = Path(model).expanduser()
    from d2c_ray.models.export import export_model as export

    for note in export(folder, Path(out).expanduser(), weights, own):
        print(f"note: {note}")
    print(f"a diffusers pipeline, whose README.md says how it is loaded: {out}")


def _of_arm(folders: dict[str, str], arm: str, what: str) -> str:
    """The folder of an arm, which must be named where there are several."""
    if arm and arm not in folders:
        from d2c_ray.wording import nearest

        raise UserError(f"--arm {arm}: no such arm; {', '.join(filter(None, folders)) or 'a folder has none'}{nearest(arm, list(folders))}")
    if not arm and len(set(folders.values())) > 1:
        raise UserError(f"the run has several {what}; --arm says which: one of {', '.join(folders)}.")
    return folders[arm] if arm else next(iter(folders.values()))


@_command("plan")
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpus: Gpus = "",
    cpus: Cpus = 0,
    address: Address = "",
    price: Annotated[
        float | None, typer.Option(min=0, metavar="PRICE", help="Of a GPU-hour, in any currency; for all GPUs, busy or not.")
    ] = None,
    mfu: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Share of a GPU's peak to assume where nothing was measured; 0.4 unless known better."),
    ] = None,
    images: Annotated[int, typer.Option(min=0, metavar="N", help="Images of the source, where it is not at hand.")] = 0,
    disk: Annotated[
        float | None, typer.Option(min=0, metavar="GB", help="Free for the run folder, where it is not on this machine.")
    ] = None,
    cache: Annotated[
        float | None, typer.Option(min=0, metavar="GB", help="Free for a node's copies of datasets (resources.cache_dir).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The numbers alone, as JSON.")] = False,
) -> None:
    from d2c_ray import forecast
    from d2c_ray.config import load
    from d2c_ray.report import estimate

    own = load(config, overrides or [])
    asked = forecast.Asked(
        _cluster(own, gpus, cpus, address), mfu, images, price, *(None if size is None else size * 1e9 for size in (disk, cache))
    )
    found = forecast.collect(own, asked)
    if as_json:
        import json

        print(json.dumps(found, indent=1))
    else:
        print(shown("\n".join(estimate.lines(found))))


def _cluster(config: Any, gpus: str, cpus: int, address: str) -> Any:
    """The cluster that is meant, described or at hand; None: this machine."""
    if address and (gpus or cpus):
        raise UserError(
            f"--address {address} and {'--gpus' if gpus else '--cpus'}: a cluster is at hand or described; one of the two would do."
        )
    from d2c_ray import hardware

    return _at_hand(config, address) if address else hardware.described(gpus, cpus) if gpus or cpus else None


def _at_hand(config: Any, address: str) -> Any:
    """What a Ray cluster has."""
    from dataclasses import replace

    from d2c_ray.distributed import cluster

    cluster.connect(replace(config.resources, address=address))
    try:
        return cluster.at_hand()
    finally:
        cluster.disconnect()


@_command("bench")
def bench(
    config: Annotated[str, typer.Argument(metavar="[CONFIG]", help="YAML file of the run to measure for; none: the defaults.")] = "",
    overrides: Overrides = None,
    thorough: Annotated[bool, typer.Option("--thorough/--quick", help="Minutes more, for steadier numbers.")] = False,
    out: Annotated[str, typer.Option(metavar="FILE", help="A .json to add to; else bench.json in run.dir, where d2c plan looks.")] = "",
) -> None:
    from pathlib import Path

    from d2c_ray import bench as benches
    from d2c_ray import forecast, rates
    from d2c_ray.config import load

    own = load(config or None, overrides or [])
    if out and not out.endswith(".json"):
        raise UserError(f"--out {out}: a file that ends in .json would do.")
    file = Path(out).expanduser() if out else Path(own.run.dir).expanduser() / rates.FILE
    _writable("--out" if out else "run.dir: its", str(file))
    found = benches.run(own, file, benches.THOROUGH if thorough else benches.QUICK, forecast.some_rows(own), say=_say)
    print("\n".join(benches.lines(found)))
    print(f"{file}{'' if out else ', from which d2c plan takes its paces'}")


@_command("config")
def config(config: ConfigPath, overrides: Overrides = None) -> None:
    from d2c_ray.config import load, to_yaml

    print(to_yaml(load(config, overrides or [])), end="")


def _load(path: str, overrides: list[str] | None) -> Any:
    """The configuration, from which on everything is said as it wants it."""
    from d2c_ray.config import load

    if "log.format=json" in (overrides or []):  # what is wrong with the configuration too
        logs.configure("json")
    config = load(path, overrides or [])
    logs.configure(config.log.format, config.run.name)
    return config


def _run(path: str, overrides: list[str] | None, upto: str) -> None:
    config = _load(path, overrides)
    from d2c_ray import pipeline

    try:
        plan = pipeline.run(config, upto, say=_say)
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on from here.")
        sys.exit(130)
    with logs.results():
        _print_results(plan, upto)


def _print_results(plan: Any, upto: str) -> None:
    if upto == "report":
        from d2c_ray.report.summary import print_summary

        print_summary(plan)
    else:
        for node in plan.of(upto):
            success = node.dir.success()
            counts = {key: success[key] for key in ("rows_done", "rows_rejected", "seconds")}
            said = f"{upto} ({', '.join(node.arms)}): {node.folder}  {counts['rows_done']} rows, {counts['rows_rejected']} rejected, {counts['seconds']} s"
            logs.table([said], [(said, {"stage": upto, "folder": node.name, "arms": node.arms, **counts})])
            if upto == "select":
                from d2c_ray.report.summary import print_selection

                print_selection(node)


def _say(text: str) -> None:
    logs.say(shown(text))


def main(argv: list[str] | None = None) -> None:
    """Entry point of `d2c`: exit status 0, or 2 for what the user can mend, 130 when interrupted, 143 when stopped (SIGTERM)."""
    try:
        app(argv, standalone_mode=True)
    except UserError as error:
        _fail(error)
    except Stopped:
        logs.say("stopped; the same command goes on from here.")
        sys.exit(STOPPED)
    except Exception as error:
        from d2c_ray.pipeline import unwrap

        found: Any = unwrap(error)
        if found is not None:
            _fail(found)
        import traceback

        whole = redacted("".join(traceback.format_exception(error)))
        logs.say(redacted(f"{type(error).__name__}: {error}"), "error", plain=whole.rstrip(), traceback=whole)
        sys.exit(1)


def _fail(error: UserError) -> None:
    logs.say(shown(redacted(str(error))), "error")
    sys.exit(2)


if __name__ == "__main__":
    main()
