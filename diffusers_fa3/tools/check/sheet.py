"""Pictures side by side: the default's, ours, and their difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffusers_fa3.tools.check.drawn import Pictures

Array = np.ndarray[Any, Any]

FRAMES = 3
"""Frames of a video that are shown: the first, the middle one and the last."""
SAMPLES = 6
SIDE = 256
"""Pixels of a picture on the sheet; small ones are enlarged by a whole number."""
MARGIN, HEAD, LABEL = 12, 36, 190


def sheet_of(pictures: Pictures, labels: Sequence[str]) -> Image.Image:
    """A row for each picture, or for some frames of each video; `labels` by sample."""
    rows = _rows(pictures, labels)
    difference = max(float(np.abs(ours - default).max()) for _, default, ours in rows)
    factor = amplification(difference)
    title = f"difference x {factor:,}" if difference else "no difference"
    tall, wide = rows[0][1].shape[:2]
    zoom = SIDE / max(tall, wide)
    zoom = max(1, math.floor(zoom)) if zoom >= 1 else zoom
    height, width = max(1, round(tall * zoom)), max(1, round(wide * zoom))
    column = max(width, 120) + MARGIN
    sheet = Image.new("RGB", (LABEL + 3 * column, HEAD + len(rows) * (height + MARGIN)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for x, name in enumerate(("default", "ours", title)):
        pen.text((LABEL + x * column, MARGIN), name, "black", font)
    for y, (label, default, ours) in enumerate(rows):
        top = HEAD + y * (height + MARGIN)
        pen.multiline_text((MARGIN, top), _wrapped(label, font), "black", font)
        for x, pixels in enumerate((default, ours, np.abs(ours - default) * factor)):
            picture = _image(pixels).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (LABEL + x * column, top))
    return sheet


def amplification(difference: float) -> int:
    """The power of ten that makes the largest difference visible, but not more than white."""
    usable = 0 < difference < math.inf
    return 10 ** max(0, math.floor(-math.log10(difference))) if usable else 1


def _rows(pictures: Pictures, labels: Sequence[str]) -> list[tuple[str, Array, Array]]:
    rows: list[tuple[str, Array, Array]] = []
    default, ours = (np.nan_to_num(x.astype(np.float32)) for x in (pictures.default, pictures.ours))
    for i in range(min(len(default), SAMPLES)):
        label = labels[i] if i < len(labels) else f"{i}"
        if default.ndim == 4:
            rows.append((label, default[i], ours[i]))
            continue
        last = default.shape[1] - 1
        for frame in dict.fromkeys(round(n * last / (FRAMES - 1)) for n in range(FRAMES)):
            rows.append((f"{label}, frame {frame}", default[i, frame], ours[i, frame]))
    return rows


def _image(pixels: Array) -> Image.Image:
    if pixels.shape[-1] == 1:
        pixels = pixels.repeat(3, axis=-1)
    return Image.fromarray((255 * pixels.clip(0, 1)).round().astype(np.uint8))


def _wrapped(text: str, font: Any) -> str:
    """Break a text between words, at the width of the column of labels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= LABEL - 2 * MARGIN:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines[:10]).strip()
