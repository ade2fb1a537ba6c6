"""ChronoEdit: Wan's image-to-video blocks over two frames, before and after the edit; no masks."""

from __future__ import annotations

from diffusers import ChronoEditTransformer3DModel

from .case import Case
from .wan import I2V_CONFIG, i2v_inputs

CASES = (
    Case(
        name="chronoedit",
        model=ChronoEditTransformer3DModel,
        config=I2V_CONFIG,
        inputs=i2v_inputs,
    ),
)
