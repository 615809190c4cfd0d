"""Pictures of pictures: strips of images as PNG data URIs."""

import base64

import numpy as np

from d2c_ray.data.decode import encode_png

STRIP_PIXELS = 56  # height of an image in a strip, at least


def strip(images: list[np.ndarray], gap: int = 2) -> str:
    """Images (H x W x C uint8, one size) side by side on white, enlarged by whole steps where small: a PNG data URI."""
    return data_uri(sheet([images], gap)) if images else ""


def data_uri(png: bytes) -> str:
    """A PNG file as a page can hold it."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def sheet(rows: list[list[np.ndarray]], gap: int = 2) -> bytes:
    """Rows of images (H x W x C uint8, one size) on white, enlarged by whole steps where small: a PNG file."""
    first = next(image for row in rows for image in row)
    factor = max(1, round(STRIP_PIXELS / first.shape[0]))
    height, width = (side * factor for side in first.shape[:2])
    longest = max(len(row) for row in rows)
    canvas = np.full((len(rows) * (height + gap) - gap, longest * (width + gap) - gap, 3), 255, np.uint8)
    for line, row in enumerate(rows):
        for index, image in enumerate(row):
            top, left = line * (height + gap), index * (width + gap)
            large = image.repeat(factor, 0).repeat(factor, 1)
            canvas[top : top + height, left : left + width] = large if large.shape[2] == 3 else large.repeat(3, 2)
    return encode_png(canvas)


def evenly(count: int, wanted: int) -> np.ndarray:
    """`wanted` indices spread evenly over 0..count-1, or all of them."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(int)) if count else np.zeros(0, int)
