"""Pictures of pictures as PNG data URIs, and how large a page shows them."""

import base64
import math
from dataclasses import dataclass

import numpy as np

from d2c_ray.data.decode import encode_png

STRIP_PIXELS = 56  # height of an image in a strip, at least
PREVIEW_ROWS = 4  # of a grid of samples that a training makes

# Of a page's tables of pictures, in CSS pixels; style.html.jinja has the same gap and padding.
MOST_PIXELS = 80  # that an image is shown at
LEAST_PIXELS = 40  # with fewer, a table is wider than the page instead
MOST_LINES = 3  # of a cell's images
GAP, PADDING, COLUMNS_PIXELS = 2, 14, 954


@dataclass(frozen=True)
class Layout:
    """How a table shows its images, all of them alike: `tile` CSS pixels a side, `across` of them in a line."""

    tile: int
    across: int


def layout(side: int, count: int, columns: int) -> Layout:
    """In as few lines as the width of the page allows; smaller than they read best where that takes `MOST_LINES`.

    Somewhat smaller ones are taken for a line less: small images by whole steps, so that their pixels are even.

    Args:
        side: pixels of an image.
        count: the most images of a cell.
        columns: of images in the table.
    """
    wanted = shown_pixels(side)
    for lines in range(1, MOST_LINES + 1):
        across = math.ceil(count / lines)
        fits = int((COLUMNS_PIXELS / columns - PADDING + GAP) / across - GAP)
        even = fits // side * side if is_enlarged(side) else fits
        if even > 0.7 * wanted:
            return Layout(min(even, wanted), across)
    return Layout(max(fits, min(wanted, LEAST_PIXELS)), across)


def shown_pixels(side: int) -> int:
    """CSS pixels a side at which an image reads well: small ones enlarged by whole steps."""
    return min(side * _steps(side), MOST_PIXELS)


def is_enlarged(side: int) -> bool:
    """Whether images are shown larger than they are, so that their pixels should stay sharp."""
    return shown_pixels(side) > side


def picture(image: np.ndarray) -> str:
    """One image (H x W x C uint8) as it is: a PNG data URI."""
    return data_uri(encode_png(image))


def strip(images: list[np.ndarray], gap: int = 2) -> str:
    """Images (H x W x C uint8, one size) side by side on white, enlarged by whole steps where small: a PNG data URI."""
    return data_uri(sheet([images], gap)) if images else ""


def data_uri(png: bytes) -> str:
    """A PNG file as a page can hold it."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def sheet(rows: list[list[np.ndarray]], gap: int = 2) -> bytes:
    """Rows of images (H x W x C uint8, one size) on white, enlarged by whole steps where small: a PNG file."""
    first = next(image for row in rows for image in row)
    factor = _steps(first.shape[0])
    height, width = (side * factor for side in first.shape[:2])
    longest = max(len(row) for row in rows)
    canvas = np.full((len(rows) * (height + gap) - gap, longest * (width + gap) - gap, 3), 255, np.uint8)
    for line, row in enumerate(rows):
        for index, image in enumerate(row):
            top, left = line * (height + gap), index * (width + gap)
            large = image.repeat(factor, 0).repeat(factor, 1)
            canvas[top : top + height, left : left + width] = large if large.shape[2] == 3 else large.repeat(3, 2)
    return encode_png(canvas)


def _steps(side: int) -> int:
    """How many times as large an image is shown."""
    return max(1, round(STRIP_PIXELS / side))


def evenly(count: int, wanted: int) -> np.ndarray:
    """`wanted` indices spread evenly over 0..count-1, or all of them."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(int)) if count else np.zeros(0, int)
