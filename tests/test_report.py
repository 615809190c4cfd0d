"""The report's page: pictures that can be compared by eye, and a bill that adds up."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from jinja2 import Environment, FileSystemLoader

from d2c_ray.progress import clock
from d2c_ray.report import contact_sheet, gather, html


def section(title: str, **values: object) -> str:
    """One section of the page, as its template makes it."""
    source = (Path(html.__file__).parent / "page.html.jinja").read_text()
    (part,) = re.findall(rf"(<h2>{title}</h2>.*?)(?=<h2>)", source, re.DOTALL)
    head = source[: source.index("<!doctype")]  # its macros
    environment = Environment(loader=FileSystemLoader(Path(html.__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(head + part).render(**values)


@pytest.mark.parametrize(
    ("side", "columns", "tile", "across"),
    [
        (8, 2, 56, 8),  # digits, real and a student: one line
        (8, 3, 56, 4),
        (8, 5, 40, 4),  # two students with and without guidance
        (32, 2, 64, 4),  # CIFAR
        (32, 5, 57, 3),
        (256, 2, 80, 4),  # ImageNet
        (256, 3, 74, 4),
        (256, 5, 57, 3),
        (256, 12, 40, 3),  # wider than the page, which scrolls
    ],
)
def test_pictures_of_a_table_have_one_size_and_few_lines(side: int, columns: int, tile: int, across: int) -> None:
    assert contact_sheet.layout(side, 8, columns) == contact_sheet.Layout(tile, across)


def test_few_and_many_images_are_laid_out_as_the_most_in_a_cell() -> None:
    """Two generated images of a class are as large as its eight real ones."""
    assert contact_sheet.layout(8, 2, 2) == contact_sheet.Layout(56, 2)
    assert contact_sheet.layout(64, 32, 2) == contact_sheet.Layout(40, 11)
    image = np.zeros((8, 8, 1), np.uint8)
    found = section(
        "Samples beside real images",
        gallery=[{"name": "zero", "real": [contact_sheet.picture(image)] * 8, "students": [[contact_sheet.picture(image)] * 2]}],
        gallery_layout=contact_sheet.layout(8, 8, 2),
        shown=[{"name": "student", "colour": "red"}],
        record={"sampler": "euler", "steps": 4, "guidance": 1.5, "weights": "ema"},
    )
    assert 'style="--full: 56px; --wide: 8"' in found
    assert found.count("<img ") == 10 and not re.search(r"<img[^>]*(width|style)=", found), "the table alone says how large"
    assert 'aria-label="generated images of zero"' in found


def test_the_bill_has_planned_beside_actual_and_a_sum_of_the_same_stages() -> None:
    seconds: dict[str, float | None] = {"manifest": 3.0, "score": None, "train": 50.0}
    arm = gather.Arm("D2C", {}, {}, [], pa.table({}), "random", seconds, {"score": 9.0, "train": 40.0})

    def table(planned: bool) -> list[list[str]]:
        bill = [
            {"stage": stage, "seconds": [took], "planned": [arm.planned.get(stage)], "shared": False} for stage, took in seconds.items()
        ]
        page = section("What it cost", arms=[arm], bill=bill, planned=planned, clock=clock)
        rows = re.findall(r"<tr.*?</tr>", page, re.DOTALL)
        return [[re.sub("<.*?>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]

    assert table(True) == [
        ["seconds", "D2C", "planned"],
        ["manifest", "3.0", "not planned"],
        ["score", "not needed", "–"],
        ["train", "50.0", "40.0"],
        ["planned stages", "50.0", "40.0"],
        ["all", "53.0 (53 s)", ""],
    ]
    arm.planned = {}
    assert table(False)[-2:] == [["train", "50.0"], ["all", "53.0 (53 s)"]]
