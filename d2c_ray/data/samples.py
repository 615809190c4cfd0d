"""The embedded data: scikit-learn's handwritten digits, 1,797 real images of 8 x 8 pixels, as PNG bytes."""

import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from d2c_ray.data import tables
from d2c_ray.data.decode import encode_png
from d2c_ray.rundir import check_own

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def digits_folder() -> Path:
    """A folder of this node with the digits as Parquet, written at the first call.

    In the layout of dataset hubs (image struct<bytes, path>, label int64), so that they take the same path as other data.
    """
    root = Path(tempfile.gettempdir()) / f"d2c_ray-cache-{os.getuid()}"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_own(root, "the embedded images", "TMPDIR names another place for it.", secret=False)
    path = root / "digits" / "digits.parquet"
    if not path.is_file():
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # 1797 x 8 x 8, levels 0..16
        images = [{"bytes": encode_png(image[..., None]), "path": f"{index:04d}.png"} for index, image in enumerate(pixels)]
        columns = {
            "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "label": pa.array(digits.target, pa.int64()),
        }
        tables.write(path, pa.table(columns), {"classes": NAMES})
    return path.parent
