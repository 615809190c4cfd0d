"""The embedded data: scikit-learn's handwritten digits, 1,797 real images of 8 x 8 pixels, as PNG bytes."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from d2c_ray.data import tables
from d2c_ray.data.decode import encode_png

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def write_digits(path: Path) -> None:
    """Writes the digits as a Parquet file in the layout of dataset hubs: image struct<bytes, path>, label int64."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # 1797 x 8 x 8, levels 0..16
    images = [{"bytes": encode_png(image[..., None]), "path": f"{index:04d}.png"} for index, image in enumerate(pixels)]
    table = pa.table(
        {
            "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "label": pa.array(digits.target, pa.int64()),
        }
    )
    tables.write(path, table, {"classes": NAMES})
