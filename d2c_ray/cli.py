"""The command line: parse, call, print. Imports nothing heavy before a command runs."""

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from d2c_ray.errors import UserError

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
    "evaluate": ("Measure the images, beside the floor and what real images score.", "d2c evaluate configs/quickstart.yaml"),
    "report": ("Run whatever is missing and write report.html.", "d2c report configs/quickstart.yaml"),
    "config": ("Print the whole configuration as it would run, defaults included.", "d2c config configs/cifar10.yaml train.lr=2e-4"),
}

# Plain help: typer's own layout imports rich, which takes longer than everything else together.
app = typer.Typer(
    name="d2c",
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


def _command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a command with its line of `COMMANDS`, and its example below its help."""
    summary, example = COMMANDS[name]
    needs = "" if name in ("run", "config") else "\n\nRuns what it needs first and is not there yet."
    if name in ("verify", "export"):
        needs = "\n\nTakes a condensed-<hash> folder, or the configuration of a run, which makes the dataset first if it is not there yet."
    return app.command(name, help=summary + needs, short_help=summary, epilog=f"\b\nExample:\n  {example}")


Condensed = Annotated[str, typer.Argument(metavar="FOLDER|CONFIG", help="A condensed dataset, or the YAML file of its run.")]


def _stage_command(stage: str) -> Callable[..., None]:
    def command(config: ConfigPath, overrides: Overrides = None) -> None:
        _run(config, overrides, stage)

    return command


@_command("run")
def run(config: ConfigPath, overrides: Overrides = None) -> None:
    _run(config, overrides, "report")


for _name in COMMANDS:
    if _name not in ("run", "config", "explain", "selectors", "verify", "export"):
        _command(_name)(_stage_command(_name))


@_command("selectors")
def selectors(
    config: ConfigPath,
    overrides: Overrides = None,
    only: Annotated[str, typer.Option(metavar="NAMES", help="Selectors to compare, separated by commas; all of them otherwise.")] = "",
) -> None:
    from d2c_ray import pipeline
    from d2c_ray.config import load

    base = load(config, overrides or [])
    found, out = pipeline.compare_selectors(base, [name.strip() for name in only.split(",") if name.strip()], say=_say)
    from d2c_ray.report.selectors import print_comparison

    print_comparison(found, out)


@_command("explain")
def explain(
    config: ConfigPath, key: Annotated[str, typer.Argument(metavar="KEY", help="The image's key, or its end.")], overrides: Overrides = None
) -> None:
    from d2c_ray import pipeline
    from d2c_ray.config import load

    plan = pipeline.finished(load(config, overrides or []), "select", say=_say)
    from d2c_ray.report import explain

    print("\n".join(explain.lines(plan, key)))


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
            print(f"note: {note}")
        for fault in found.faults:
            print(f"wrong: {fault}")
        print(f"{f'{len(found.faults)} wrong' if found.faults else 'all right'}: {folder}: {found.summary()}")
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
    if arm and arm not in folders:
        from d2c_ray.errors import nearest

        raise UserError(f"--arm {arm}: no such arm; {', '.join(filter(None, folders)) or 'a folder has none'}{nearest(arm, list(folders))}")
    if not arm and len(set(folders.values())) > 1:
        raise UserError(f"the run has several condensed datasets; --arm says which: one of {', '.join(folders)}.")
    from d2c_ray.data.export import export

    count = export(folders[arm] if arm else next(iter(folders.values())), form, out, per_shard)
    print(f"{count:,} images: {out}")


def _condensed(given: str, overrides: list[str] | None) -> dict[str, str]:
    """The condensed datasets meant, by arm: of a folder, or of a configuration's run."""
    from pathlib import Path

    if Path(given).is_dir() or not given.lower().endswith((".yaml", ".yml")):
        if overrides:
            raise UserError(f"'{given}' is a folder, to which {overrides[0]} means nothing; changes go with a configuration file.")
        return {"": given}
    from d2c_ray import pipeline
    from d2c_ray.config import load

    plan = pipeline.finished(load(given, overrides or []), "attach", say=_say)
    return {name: str(nodes["attach"].folder) for name, nodes in plan.arms.items()}


@_command("config")
def config(config: ConfigPath, overrides: Overrides = None) -> None:
    from d2c_ray.config import load, to_yaml

    print(to_yaml(load(config, overrides or [])), end="")


def _run(path: str, overrides: list[str] | None, upto: str) -> None:
    from d2c_ray.config import load

    config = load(path, overrides or [])
    from d2c_ray import pipeline

    try:
        plan = pipeline.run(config, upto, say=_say)
    except KeyboardInterrupt:
        print("d2c: interrupted; the same command goes on from here.", file=sys.stderr)
        sys.exit(130)
    if upto == "report":
        from d2c_ray.report.summary import print_summary

        print_summary(plan)
    else:
        for node in plan.of(upto):
            success = node.dir.success()
            print(
                f"{upto} ({', '.join(node.arms)}): {node.folder}  {success['rows_done']} rows, {success['rows_rejected']} rejected, {success['seconds']} s"
            )
            if upto == "select":
                from d2c_ray.report.summary import print_selection

                print_selection(node)


def _say(text: str) -> None:
    print(f"d2c: {text}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `d2c`: exit status 0, or 2 for what the user can mend, 130 when interrupted."""
    try:
        app(argv, standalone_mode=True)
    except UserError as error:
        _fail(error)
    except Exception as error:
        from d2c_ray.pipeline import unwrap

        found: Any = unwrap(error)
        if found is None:
            raise
        _fail(found)


def _fail(error: UserError) -> None:
    print(f"d2c: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
