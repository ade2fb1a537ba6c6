"""JoyImage-Edit masks nothing; Edit-Plus masks [image, pads, text, pads], one mask for all layers.

Images of Edit-Plus are padded where samples of a batch have different ones: then keys in the middle
are hidden even if no text is padded. Without a mask of the text there is none at all.
"""

from __future__ import annotations

from diffusers import JoyImageEditPlusTransformer3DModel, JoyImageEditTransformer3DModel

from .case import ANY_MASK, BATCH, TEXT, Case, Inputs, Layout, prompt, randn, timesteps

PATCHES = 20  # of a 4 x 4 target and a 2 x 2 reference
TARGET = 16


def _inputs(layout: Layout, pads: float) -> Inputs:
    return {
        "hidden_states": randn(BATCH, 2, 4, 1, 8, 8),  # reference and target
        "timestep": timesteps(1000),
        "encoder_hidden_states": randn(BATCH, TEXT, 16, seed=1),
    }


def _plus_inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, 16, pads)
    return {
        "hidden_states": randn(BATCH, PATCHES, 4, 1, 2, 2),
        "timestep": timesteps(1000),
        "encoder_hidden_states": text,
        "encoder_hidden_states_mask": mask,
        "shape_list": [[(1, 4, 4), (1, 2, 2)]] * BATCH,
    }


def _ragged_images(layout: Layout, pads: float) -> Inputs:
    inputs = _plus_inputs(layout, pads)
    inputs["hidden_states"][0, TARGET + 1 :] += pads
    return {**inputs, "shape_list": [[(1, 4, 4), (1, 1, 1)], [(1, 4, 4), (1, 2, 2)]]}


CONFIG = {
    "in_channels": 4,
    "hidden_size": 256,
    "num_attention_heads": 2,
    "text_dim": 16,
    "num_layers": 2,
    "rope_dim_list": (16, 56, 56),
}

CASES = (
    Case(
        name="joyimage_edit",
        model=JoyImageEditTransformer3DModel,
        config=CONFIG,
        inputs=_inputs,
    ),
    Case(
        name="joyimage_edit_plus",
        model=JoyImageEditPlusTransformer3DModel,
        config=CONFIG,
        inputs=_plus_inputs,
        layouts=ANY_MASK,
        pick=lambda returned: returned[0][:, :TARGET],
    ),
    Case(
        name="joyimage_edit_plus_ragged_images",
        model=JoyImageEditPlusTransformer3DModel,
        config=CONFIG,
        inputs=_ragged_images,
        layouts=("all_true", "right", "left", "ragged", "gap"),
        pick=lambda returned: returned[0][:, :TARGET],
    ),
)
