"""Pictures of pictures: strips of images as PNG data URIs."""

import base64

import numpy as np

from d2c_ray.data.decode import encode_png

STRIP_PIXELS = 56  # height of an image in a strip, at least


def strip(images: list[np.ndarray], gap: int = 2) -> str:
    """Images (H x W x C uint8, one size) side by side on white, enlarged by whole steps where small: a PNG data URI."""
    if not images:
        return ""
    factor = max(1, round(STRIP_PIXELS / images[0].shape[0]))
    height, width = (side * factor for side in images[0].shape[:2])
    canvas = np.full((height, len(images) * (width + gap) - gap, 3), 255, np.uint8)
    for index, image in enumerate(images):
        large = image.repeat(factor, 0).repeat(factor, 1)
        canvas[:, index * (width + gap) : index * (width + gap) + width] = large if large.shape[2] == 3 else large.repeat(3, 2)
    return "data:image/png;base64," + base64.b64encode(encode_png(canvas)).decode()


def evenly(count: int, wanted: int) -> np.ndarray:
    """`wanted` indices spread evenly over 0..count-1, or all of them."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(int)) if count else np.zeros(0, int)
