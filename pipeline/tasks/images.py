"""Encoded image files as arrays of pixels."""

import io
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Mode = Literal["L", "RGB"]
GRAY_MODES = frozenset({"1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "I;16N"})


def decode(encoded: bytes, mode: Mode, resize: tuple[int, int] | None = None) -> np.ndarray:
    """Return the image as uint8 [C, H, W], turned upright by its EXIF tag.

    16-bit gray becomes 8-bit by rounding. `resize` is (height, width), bilinear with antialiasing.

    Raises:
        ValueError: the bytes are no image that Pillow reads whole.
    """
    image = _eight_bit(_open(encoded)).convert(mode)
    if resize is not None and image.size != resize[::-1]:
        image = image.resize(resize[::-1], Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if mode == "L" else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def measure(encoded: bytes) -> tuple[Mode, int, int]:
    """Return an image's mode (gray or colour), height and width.

    Raises:
        ValueError: the bytes are no image that Pillow reads whole.
    """
    image = _open(encoded)
    return "L" if image.mode in GRAY_MODES else "RGB", image.height, image.width


def _open(encoded: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(encoded))
        image.load()
        return ImageOps.exif_transpose(image)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the bytes are no readable image ({error})") from None


def _eight_bit(image: Image.Image) -> Image.Image:
    if not image.mode.startswith("I"):
        return image
    # Pillow clips 16-bit values at 255 instead of scaling them (python-pillow/Pillow#3011).
    levels = np.asarray(image, dtype=np.float64)
    return Image.fromarray(np.rint(levels.clip(0, 65535) / 257).astype(np.uint8))
