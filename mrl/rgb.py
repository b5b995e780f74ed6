"""PIL images of any mode as 8-bit RGB: upright, transparency over white, 16-bit and float pixels scaled."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageOps

BITS_PER_SAMPLE, PHOTOMETRIC, ORIENTATION, SAMPLE_FORMAT = 258, 262, 274, 339  # tags of TIFF
WHITE_IS_ZERO, UNSIGNED, SIGNED = 0, 1, 2
NO_WHITE = "its pixels are signed integers, of which none is defined as white; save it with 8 or 16 bits, unsigned"


def to_rgb(image: Image.Image, exif_rotation: str = "apply") -> Image.Image:
    """Return an image of any mode as RGB.

    Args:
        image: It is not changed.
        exif_rotation: "apply" turns it upright as its EXIF data say; "ignore" takes the pixels as they are stored.
    """
    tags: Any = getattr(image, "tag_v2", {})
    kind = image.format
    if tags.get(SAMPLE_FORMAT, (UNSIGNED,))[0] == SIGNED:
        raise ValueError(NO_WHITE)
    if exif_rotation == "apply":
        image = ImageOps.exif_transpose(image)
    elif kind == "TIFF":  # Pillow turns those when it loads them: turn them back
        orientation = image.getexif().get(ORIENTATION, 1)
        image = image.copy()
        image.getexif()[ORIENTATION] = {6: 8, 8: 6}.get(orientation, orientation)
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return Image.fromarray(_eight_bits(image, kind, tags)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image, kind: str | None, tags: Any) -> np.ndarray:
    """Return the pixels ``(H, W)`` of a gray image of more than 8 bits as uint8."""
    pixels = np.asarray(image)
    if image.mode == "F":
        low, high = float(pixels.min()), float(pixels.max())
        if not 0 <= low <= high <= 1:  # not true of NaN either
            raise ValueError(f"its pixels are floats from {low:g} to {high:g}; allowed: 0 (black) to 1 (white)")
        white = 1.0
    elif image.mode.startswith("I;"):  # 16 bits, or the 12 bits of some TIFFs
        white = 2.0 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
    elif kind in ("PPM", "PNG"):  # Pillow scales theirs to 16 bits
        white = 65535.0
    elif kind == "TIFF":
        pixels, white = pixels.view(np.uint32), 2.0**32 - 1
    else:
        raise ValueError(NO_WHITE)
    scaled = np.rint(pixels * (255 / white)).astype(np.uint8)
    return 255 - scaled if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else scaled
