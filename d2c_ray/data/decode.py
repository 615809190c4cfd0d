"""From encoded bytes to pixels: what is decoded, how it is cropped, and why an image is refused."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# The limit of decode() replaces PIL's, which warns at one size and raises at another.
Image.MAX_IMAGE_PIXELS = None
# PIL knows some forty formats, many of them hardly ever read. EPS is a program, which it gives to Ghostscript to run.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
_BAND_VALUES = 1 << 20  # of a 16-bit or float image, at once


class Undecodable(ValueError):
    """The bytes are no image that can be trained on; the message is the reason that goes into `rejected`."""


def decode(content: bytes, size: int, channels: int, max_pixels: int) -> np.ndarray:
    """An encoded image as uint8, size x size x channels.

    The first frame of animated files; rotated as its EXIF says; 16-bit grey scaled to 8; alpha over white; CMYK and
    palettes converted; then ADM's centre crop.

    Raises:
        Undecodable: empty, truncated or no image, or more than `max_pixels` pixels (a decompression bomb).
    """

    def crop(image: Image.Image) -> np.ndarray:
        # Also once its short side is brought to `size`: a picture of 1 x 60,000 pixels is a bomb too.
        growth = max(1.0, size / min(image.size)) ** 2
        if image.width * image.height * growth > max_pixels:
            raise Undecodable(
                f"{image.width} x {image.height} pixels, more than data.max_pixels={max_pixels} when read or cropped to {size}"
            )
        return centre_crop(_loaded(image, "L" if channels == 1 else "RGB"), size)

    return _opened(content, crop)


def decode_whole(content: bytes, max_pixels: int) -> np.ndarray:
    """An encoded image as it is, uint8 H x W x 3, neither cropped nor resized; else as `decode`.

    Raises:
        Undecodable: empty, truncated or no image, or more than `max_pixels` pixels (a decompression bomb).
    """

    def whole(image: Image.Image) -> np.ndarray:
        if image.width * image.height > max_pixels:
            raise Undecodable(f"{image.width} x {image.height} pixels, more than {max_pixels}")
        return np.array(_loaded(image, "RGB"))

    return _opened(content, whole)


def _opened(content: bytes, read: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    """What `read` makes of the opened image, whatever PIL raises as `Undecodable`."""
    if not content:
        raise Undecodable("empty: 0 bytes")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return read(image)
    except UnidentifiedImageError:
        raise Undecodable(f"no known image format in {len(content)} bytes") from None
    except (Undecodable, MemoryError):
        raise
    except Exception as error:
        # Broken files make PIL raise anything (struct.error, TypeError, SyntaxError, ...); the text says what it met.
        raise Undecodable(f"{type(error).__name__}: {error}") from None


def _loaded(image: Image.Image, mode: str) -> Image.Image:
    image.load()
    return _to_mode(ImageOps.exif_transpose(image), mode)


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's centre crop: halve with a box filter while the short side is twice too long, bicubic to `size`, crop.

    Source: guided-diffusion's rule (Dhariwal and Nichol, arXiv 2105.05233), which the published statistics use.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if min(image.size) != size:
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return np.ascontiguousarray(pixels[top : top + size, left : left + size].reshape(size, size, -1))


def encode_png(pixels: np.ndarray) -> bytes:
    """uint8 H x W x C, one or three channels, as PNG bytes."""
    out = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(out, format="PNG")
    return out.getvalue()


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_bytes(np.asarray(image), image.mode))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _to_bytes(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey of 16 bits or in floats as uint8, some rows at a time: in float64 a large image would take many times its own memory."""
    # 16-bit files hold 0..65535; anything else has no defined white, so its own largest value is taken.
    top = 65_535.0 if mode.startswith("I") else max(float(values.max()), 1e-12)
    out = np.empty(values.shape, np.uint8)
    rows = max(1, _BAND_VALUES // values.shape[1])
    for start in range(0, len(values), rows):
        some = values[start : start + rows].astype(np.float64)
        out[start : start + rows] = (np.clip(some / top, 0.0, 1.0) * 255.0).round()
    return out
