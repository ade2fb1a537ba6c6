"""Wan Animate: Wan's image-to-video blocks, and face blocks with their own processor; no masks.

A face block folds frames into the batch: the 16 tokens of a frame see the motion tokens of that
frame alone, B * T short sequences in place of B.
"""

from __future__ import annotations

from diffusers import WanAnimateTransformer3DModel

from .case import BATCH, Case, Inputs, Layout, randn
from .wan import I2V_CONFIG, i2v_inputs

FACE = 8  # pixels
FACE_FRAMES = 5  # pixel frames: their encoder makes 2 latent frames of them


def _inputs(layout: Layout, pads: float) -> Inputs:
    # The first frame is the reference image: it has neither pose nor face.
    return {
        **i2v_inputs(layout, pads),
        "hidden_states": randn(BATCH, 12, 3, 8, 8),
        "pose_hidden_states": randn(BATCH, 4, 2, 8, 8, seed=3),
        "face_pixel_values": randn(BATCH, 3, FACE_FRAMES, FACE, FACE, seed=4),
    }


CASES = (
    Case(
        name="wan_animate",
        model=WanAnimateTransformer3DModel,
        config={
            **I2V_CONFIG,
            "in_channels": 12,
            "latent_channels": 4,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8},
            "motion_encoder_size": FACE,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 8,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 1,
        },
        inputs=_inputs,
    ),
)
