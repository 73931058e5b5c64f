"""Pictures as PNG: a strip in a results file, in base64, and a grid of originals above reconstructions."""

from __future__ import annotations

import base64
import binascii
import io
import struct
import warnings
from dataclasses import dataclass

import numpy as np

SHOWN = 8
"""Pictures in a strip: enough to see what was learned, few enough for a results file."""
MAGIC = b"\x89PNG\r\n\x1a\n"
MOST_BYTES = 512 * 1024
MOST_SIDES = (2048, 256)
GAP = 2  # pixels between the pictures of a grid


def strip_png(pictures: np.ndarray) -> str:
    """Draw pictures (N, 3, H, W), bytes or floats in [0, 1] (cut off outside), side by side; base64 of the PNG."""
    strip = np.concatenate(list(to_bytes(pictures).transpose(0, 2, 3, 1)), axis=1)
    return base64.b64encode(_png(strip)).decode("ascii")


def grid_png(originals: np.ndarray, made: np.ndarray) -> bytes:
    """Pictures (N, 3, H, W) in rows of at most eight, each above its reconstructions; enlarged twice, as a PNG.

    Bytes or floats in [0, 1], cut off outside.
    """
    count, _, height, width = originals.shape
    columns = min(count, SHOWN)
    rows = -(-count // columns)
    paper = np.full((rows, 2, columns, height + GAP, width + GAP, 3), 255, np.uint8)
    for kind, pictures in enumerate((originals, made)):
        for i, picture in enumerate(to_bytes(pictures).transpose(0, 2, 3, 1)):
            paper[i // columns, kind, i % columns, :height, :width] = picture
    sheet = paper.transpose(0, 1, 3, 2, 4, 5).reshape(rows * 2 * (height + GAP), columns * (width + GAP), 3)
    return _png(sheet.repeat(2, axis=0).repeat(2, axis=1))


def to_bytes(pictures: np.ndarray) -> np.ndarray:
    """Bytes of pictures that are floats in [0, 1], cut off outside; bytes stay as they are."""
    if pictures.dtype == np.uint8:
        return pictures
    return np.round(np.clip(np.nan_to_num(pictures), 0, 1) * 255).astype(np.uint8)


def _png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) bytes as a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", optimize=True)
    return file.getvalue()


@dataclass(frozen=True)
class Picture:
    """A PNG that may be shown on a page."""

    uri: str
    width: int
    height: int


def checked_picture(text: str | None) -> Picture | None:
    """The picture of a base64 text; None if that is not a PNG, or not of a size that a strip of pictures has."""
    if text is None or len(text) > 2 * MOST_BYTES:
        return None
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    if len(data) > MOST_BYTES or len(data) < 33 or not data.startswith(MAGIC) or data[12:16] != b"IHDR":
        return None
    width, height = struct.unpack(">II", data[16:24])
    if not (0 < width <= MOST_SIDES[0] and 0 < height <= MOST_SIDES[1]):
        return None
    from PIL import Image

    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            warnings.simplefilter("ignore")
            image.load()
    except Exception:  # whatever its fault is, it is not shown
        return None
    return Picture("data:image/png;base64," + base64.b64encode(data).decode("ascii"), width, height)
