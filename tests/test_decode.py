"""Every kind of image that is decoded or refused."""

import io

import numpy as np
import pytest
from PIL import Image

from d2c_ray.data.decode import Undecodable, centre_crop, decode, encode_png


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return out.getvalue()


def colour(size: tuple[int, int] = (48, 40)) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def test_png_survives_to_the_bit() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 1), dtype=np.uint8)
    assert np.array_equal(decode(encode_png(pixels), 8, 1, 10**6), pixels)
    pixels = pixels.repeat(3, 2)
    assert np.array_equal(decode(encode_png(pixels), 8, 3, 10**6), pixels)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "LA", "1", "I;16", "YCbCr"])
def test_modes_become_rgb(mode: str) -> None:
    if mode == "I;16":
        content = encoded(Image.fromarray((np.arange(40 * 48).reshape(40, 48) * 34).astype(np.uint16)))
    elif mode in ("CMYK", "YCbCr"):
        content = encoded(colour().convert(mode), "JPEG")
    else:
        content = encoded(colour().convert("RGBA" if mode == "LA" else "RGB").convert(mode))
    decoded = decode(content, 32, 3, 10**6)
    assert decoded.shape == (32, 32, 3)
    assert decoded.dtype == np.uint8
    assert decoded.std() > 5, "a blank picture"


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    content = encoded(Image.fromarray(np.full((8, 8), 32_768, np.uint16)))
    assert np.array_equal(decode(content, 8, 1, 10**6), np.full((8, 8, 1), 128, np.uint8))


def test_alpha_is_laid_over_white() -> None:
    content = encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0)))
    assert (decode(content, 8, 3, 10**6) == 255).all()


def test_exif_rotation_is_applied() -> None:
    image = Image.fromarray(
        np.concatenate([np.zeros((16, 8, 3), np.uint8), np.full((16, 8, 3), 255, np.uint8)], 1)
    )  # dark left, light right
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: dark top, light bottom
    decoded = decode(encoded(image, "PNG", exif=exif), 16, 3, 10**6)
    assert decoded[:6].mean() < 20
    assert decoded[-6:].mean() > 235


def test_animated_files_give_their_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")]
    decoded = decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), 8, 3, 10**6)
    assert decoded[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"this is no image at all", "no known image format"),
        (encoded(colour(), "JPEG")[:-400], "truncated"),
        (encoded(colour(), "PNG")[:200], ""),
        (encoded(colour((200, 200)), "PNG"), "more than data.max_pixels=10000"),
        (encoded(colour((1, 900)), "PNG"), "1 x 900 pixels.*when read or cropped to 32"),
    ],
    ids=["empty", "text", "cut jpeg", "cut png", "bomb", "bomb by aspect"],
)
def test_what_cannot_be_decoded_says_why(content: bytes, reason: str) -> None:
    with pytest.raises(Undecodable, match=reason or "."):
        decode(content, 32, 3, 10_000)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "GIF", "WEBP", "BMP"])
def test_damaged_files_decode_or_say_why(kind: str) -> None:
    """Flipped bytes make PIL raise many kinds of error; none may escape and end a stage."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    whole = encoded(colour(), kind, exif=exif)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[rng.integers(0, min(len(damaged), 400), 4)] = rng.integers(0, 255, 4)
        try:
            assert decode(damaged.tobytes(), 32, 3, 10**6).shape == (32, 32, 3)
        except Undecodable:
            refused += 1
    assert refused or kind in ("GIF", "BMP"), "damage that never shows tests nothing"


@pytest.mark.parametrize("shape", [(500, 375), (375, 500), (64, 64), (130, 65), (20, 33)])
def test_centre_crop_equals_the_published_rule(shape: tuple[int, int]) -> None:
    """Written down a second time from guided-diffusion's description: box halvings, one bicubic step, crop."""
    image, size = colour(shape), 64
    reference = image
    while min(*reference.size) >= 2 * size:
        reference = reference.resize(tuple(side // 2 for side in reference.size), resample=Image.Resampling.BOX)
    scale = size / min(*reference.size)
    reference = reference.resize(tuple(round(side * scale) for side in reference.size), resample=Image.Resampling.BICUBIC)
    array = np.array(reference)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    assert np.array_equal(centre_crop(image, size), array[y : y + size, x : x + size])
