"""Pictures as PNG: a strip in a results file, in base64, and a grid of originals above reconstructions."""

from __future__ import annotations

import base64
import io

import numpy as np

SHOWN = 8
"""Pictures in a strip: enough to see what was learned, few enough for a results file."""
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


def picture_uri(text: str | None) -> str | None:
    """The picture of a base64 text as a data URI; None if it is not a PNG, or larger than a strip of pictures."""
    from PIL import Image

    try:
        data = base64.b64decode(text or "", validate=True)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.width > MOST_SIDES[0] or image.height > MOST_SIDES[1]:
                return None
            image.load()
    except Exception:  # whatever its fault is, it is not shown
        return None
    return f"data:image/png;base64,{text}"
