"""Pictures in a results file: a strip of a few, side by side, as a PNG in base64."""

from __future__ import annotations

import base64
import io

import numpy as np

SHOWN = 8
"""Pictures in a strip: enough to see what was learned, few enough for a results file."""


def strip_png(pictures: np.ndarray) -> str:
    """Draw pictures (N, 3, H, W), bytes or floats in [0, 1] (cut off outside), side by side; base64 of the PNG."""
    from PIL import Image

    if pictures.dtype != np.uint8:
        pictures = np.round(np.clip(np.nan_to_num(pictures), 0, 1) * 255).astype(np.uint8)
    strip = np.concatenate(list(pictures.transpose(0, 2, 3, 1)), axis=1)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(strip)).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")
