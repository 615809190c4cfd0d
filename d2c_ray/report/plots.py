"""The report's figures, as SVG text."""

import io
from typing import Any

import matplotlib
import numpy as np

from d2c_ray.report.gather import Arm
from d2c_ray.wording import shown as printable

matplotlib.use("Agg")

COLOURS = ("#1f5fbf", "#d9822b", "#3a8f5c", "#8a4fbf", "#b5373c", "#4d7c8a", "#a3863b", "#c25e9a", "#5b6470")
GREY = "#c9ced6"
STYLE: Any = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#7a828e", "axes.labelcolor": "#333a44",
    "xtick.color": "#555d69", "ytick.color": "#555d69", "legend.frameon": False, "svg.fonttype": "none", "svg.hashsalt": "d2c",
    "font.family": "sans-serif", "figure.constrained_layout.use": True,
    "text.parse_math": False,  # names of classes and students are shown as they are
}  # fmt: skip


def score_histogram(scores: np.ndarray, sample_ids: np.ndarray, arms: list[Arm], classes: list[tuple[int, str]]) -> str:
    """Histogram of all scores with each arm's chosen ones over it, and the chosen ranks of each class."""
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        figure, (top, bottom) = plt.subplots(
            2, 1, figsize=(9, 3.2 + 0.24 * len(classes) * len(arms)), height_ratios=[2.6, 0.24 * len(classes) * len(arms) + 0.6]
        )
        shown = np.clip(scores, None, np.quantile(scores, 0.995))  # a few outliers would flatten the rest
        bins = np.histogram_bin_edges(shown, bins=60)
        top.hist(shown, bins=bins, color=GREY, label=f"all {len(scores):,} images")
        for index, arm in enumerate(arms):
            chosen = np.isin(sample_ids, arm.chosen.column("sample_id").to_numpy())
            top.hist(
                shown[chosen], bins=bins, histtype="step", linewidth=1.6, color=_colour(index), label=f"{arm.name}: {chosen.sum():,} chosen"
            )
        top.set_xlabel("difficulty score (noise-prediction error), harder to the right")
        top.set_ylabel("images")
        top.legend(loc="upper right")
        names = []
        for row, (label, name) in enumerate(classes):
            for index, arm in enumerate(arms):
                mine = arm.chosen.filter(
                    np.maximum(arm.chosen.column("label").to_numpy(), 0) == label
                )  # -1 is the one class of unlabelled data
                height = -(row * len(arms) + index) - 0.35 * row
                x = (mine.column("rank").to_numpy() + 0.5) / np.maximum(mine.column("class_size").to_numpy(), 1)
                bottom.hlines(height, 0, 1, color="#e6e9ee", linewidth=5, zorder=0)
                bottom.scatter(x, np.full(len(x), height), marker="|", s=42, linewidths=1.1, color=_colour(index))
            names.append((-(row * len(arms) + (len(arms) - 1) / 2) - 0.35 * row, printable(name)))
        bottom.set_yticks([height for height, _ in names], [name if len(name) < 22 else name[:20] + "…" for _, name in names])
        bottom.tick_params(axis="y", length=0)
        bottom.set_xlim(-0.005, 1.005)
        bottom.set_xlabel("rank in the class, easiest 0 to hardest 1; a mark is a chosen image")
        bottom.spines["left"].set_visible(False)
        return _svg(figure)


def training_curves(arms: list[Arm]) -> str:
    """Loss of the students, and their alignment loss where there is one, by images shown."""
    from matplotlib import pyplot as plt

    aligned = [arm for arm in arms if any(point["loss_align"] for point in arm.curve)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2 if aligned else 1, figsize=(9, 2.9), squeeze=False)
        for index, arm in enumerate(arms):
            images = [point["images"] for point in arm.curve]
            axes[0, 0].plot(images, [point["loss"] for point in arm.curve], color=_colour(index), label=arm.name)
            if arm in aligned:
                axes[0, 1].plot(images, [-point["loss_align"] for point in arm.curve], color=_colour(index), label=arm.name)
        axes[0, 0].set_ylabel("diffusion loss")
        axes[0, 0].legend()
        if aligned:
            axes[0, 1].set_ylabel("cosine to the vision tokens")
        for axis in axes[0]:
            axis.set_xlabel("images shown")
            axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}")
        return _svg(figure)


def selectors(found: dict[str, Any]) -> str:
    """Fréchet distance against recall of every selector's subset, and its quantiles of difficulty where images are scored."""
    from matplotlib import pyplot as plt

    rows = found["selectors"]
    scored = found["score_quantiles_of_all"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2 if scored else 1, figsize=(9, 0.32 * len(rows) + 2.4), squeeze=False)
        places = []
        for index, (name, row) in enumerate(rows.items()):
            if row["frechet"] is not None and row["recall"] is not None:
                axes[0, 0].scatter(row["recall"], row["frechet"], color=_colour(index), s=46, zorder=2)
                places.append((row["recall"], row["frechet"], name))
        axes[0, 0].set_xlabel("recall: share of the whole near a chosen image")
        axes[0, 0].set_ylabel("Fréchet distance to the whole")
        axes[0, 0].margins(0.18, 0.12)
        for x, y, name in places:
            axes[0, 0].annotate(name, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=9, color="#333a44")
        if scored:
            boxes = {"all images": scored, **{name: row["score_quantiles"] for name, row in rows.items()}}
            for height, (name, values) in enumerate(reversed(boxes.items())):
                colour = GREY if name == "all images" else _colour(list(rows).index(name))
                low, tenth, quarter, middle, three, ninety, _ = values
                axes[0, 1].hlines(height, tenth, ninety, color=colour, linewidth=2)
                axes[0, 1].hlines(height, quarter, three, color=colour, linewidth=7)
                axes[0, 1].scatter(middle, height, color="white", edgecolors="#333a44", s=26, zorder=3)
                axes[0, 1].scatter(low, height, color=colour, marker="|", s=40)
            axes[0, 1].set_yticks(range(len(boxes)), list(reversed(boxes)))
            axes[0, 1].tick_params(axis="y", length=0)
            axes[0, 1].spines["left"].set_visible(False)
            axes[0, 1].set_xlabel("difficulty score: least, 10, 25, 50, 75, 90 %")
        return _svg(figure)


def against_budget(
    lines: dict[str, list[tuple[int, float, float, list[float]]]],
    floors: dict[str, list[tuple[int, float]]],
    real: float | None,
    heading: str,
) -> str:
    """A measure by images kept, a line a selector with its deviation over seeds; single trials as points, floors dashed.

    Args:
        lines: by selector, (images kept, mean, deviation, every trial's value). floors: (images kept, value).
    """
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(9, 3.8))
        for index, (name, points) in enumerate(lines.items()):
            shift = 1.0 + 0.012 * (index - (len(lines) - 1) / 2)  # so that error bars do not hide each other
            x = [kept * shift for kept, *_ in points]
            axis.errorbar(
                x,
                [mean for _, mean, *_ in points],
                [spread for _, _, spread, _ in points],
                color=_colour(index),
                capsize=3,
                marker="o",
                label=name,
            )
            for place, (_, _, _, values) in zip(x, points, strict=True):
                axis.scatter([place] * len(values), values, color=_colour(index), s=9, alpha=0.35, linewidths=0)
            if floors.get(name):
                axis.plot(
                    [kept for kept, _ in floors[name]], [value for _, value in floors[name]], color=_colour(index), linestyle=":", linewidth=1.2,
                    label=f"floor of {name}",
                )  # fmt: skip
        if real is not None:
            axis.axhline(real, color="#7a828e", linewidth=1, linestyle="--", label="real images, held out")
        axis.set_xscale("log")
        ticks = sorted({kept for points in lines.values() for kept, *_ in points})
        axis.set_xticks(ticks, [f"{kept:,}" for kept in ticks])
        axis.minorticks_off()
        axis.set_xlabel("images kept")
        axis.set_ylabel(heading)
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        return _svg(figure)


def against_cost(
    points: list[tuple[float, float, float | None, str]], selectors: list[str], front: list[tuple[float, float]], heading: str
) -> str:
    """A measure by seconds of making the student, a point each with its deviation over seeds, and the front of those that nothing beats.

    Args:
        points: (seconds, mean, deviation, selector). front: (seconds, mean), cheapest first.
    """
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(9, 3.6))
        axis.plot(
            *zip(*front, strict=True), color=GREY, drawstyle="steps-post", linewidth=2, zorder=1, label="nothing is better and cheaper"
        )
        for index, name in enumerate(selectors):
            mine = [point for point in points if point[3] == name]
            axis.errorbar(
                [x for x, *_ in mine], [y for _, y, *_ in mine], [spread or 0.0 for _, _, spread, _ in mine], color=_colour(index), capsize=2, marker="o",
                markersize=5, linestyle="none", elinewidth=0.8, label=name,
            )  # fmt: skip
        axis.set_xlabel("seconds of GPUs (else of cores): teacher, scoring, selecting, attaching, training")
        axis.set_ylabel(heading)
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        return _svg(figure)


def heat_maps(maps: dict[str, tuple[list[str], list[str], np.ndarray]], axes: tuple[str, str], heading: str, more_is_better: bool) -> str:
    """A measure over two axes, a map a selector on one scale of colours, with the numbers written in.

    Args:
        maps: by selector, the values of the first axis (across), of the second (down), and the means, down x across.
    """
    from matplotlib import pyplot as plt

    with plt.rc_context({**STYLE, "axes.spines.left": False, "axes.spines.bottom": False}):
        height = 1.5 + 0.5 * max(len(down) for _, down, _ in maps.values())
        figure, every = plt.subplots(1, len(maps), figsize=(9, height), squeeze=False, sharey=True)
        values = np.concatenate([grid.ravel() for *_, grid in maps.values()])
        low, high = np.nanmin(values), np.nanmax(values)
        shades = plt.get_cmap("YlGnBu" if more_is_better else "YlGnBu_r")
        for axis, (name, (across, down, grid)) in zip(every[0], maps.items(), strict=True):
            axis.imshow(grid, cmap=shades, vmin=low, vmax=high if high > low else low + 1, aspect="auto")
            axis.set_xticks(range(len(across)), across)
            axis.set_yticks(range(len(down)), down)
            axis.tick_params(length=0)
            axis.set_title(name, fontsize=10)
            axis.set_xlabel(axes[0].rsplit(".", 1)[-1])
            for (i, j), value in np.ndenumerate(grid):
                dark = (value - low) / ((high - low) or 1.0)
                ink = "white" if (dark if more_is_better else 1 - dark) > 0.6 else "#1d232b"
                axis.text(j, i, "–" if np.isnan(value) else f"{value:.4g}", ha="center", va="center", color=ink, fontsize=9)
        every[0][0].set_ylabel(axes[1].rsplit(".", 1)[-1])
        figure.suptitle(heading, fontsize=10, x=0.01, ha="left")
        return _svg(figure)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _svg(figure: Any) -> str:
    from matplotlib import pyplot as plt

    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    plt.close(figure)
    text = out.getvalue()
    return text[text.index("<svg") :]
