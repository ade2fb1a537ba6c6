"""Wan Animate 2: a reference pass fills a cache, the steps of the generation read it.

The reference pass attends without masks. A step packs [generation, cached reference], either part
padded to 128, and pins self attention to flex_attention by a BlockMask: all of the generation, and
of the reference the frame before the query's own. Cross attention has a second call over image
tokens, as Wan's.
"""

from __future__ import annotations

from unittest import mock

import torch
from diffusers import WanAnimate2Transformer3DModel
from diffusers.models.transformers import transformer_wan_animate_2
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from .anyflow_far import PINNED
from .case import BATCH, TEXT, Case, Inputs, Layout, randn, timesteps

FRAMES = 2  # of the reference; the generation has one more
PIXELS = [64, 64]  # 4x4 tokens a frame
HEADS, HEAD_DIM = 2, 128


class Uncompiled(WanAnimate2Transformer3DModel):
    """Makes its mask without torch.compile, which takes a CPU a quarter of a minute."""

    def create_mask(self, *args: object) -> BlockMask:
        """The same mask."""

        def create(*args: object, **kwargs: object) -> BlockMask:
            return create_block_mask(*args, **{**kwargs, "_compile": False})

        with mock.patch.object(transformer_wan_animate_2, "create_block_mask", create):
            return super().create_mask(*args)


def _inputs(layout: Layout, pads: float, frames: int = FRAMES) -> Inputs:
    return {
        "hidden_states": list(randn(BATCH, 4, frames, 8, 8)),
        "timestep": timesteps(1000),
        "encoder_hidden_states": list(randn(BATCH, TEXT, 16, seed=1)),
        "condition_latents": list(randn(BATCH, 5, frames, 8, 8, seed=2)),
        "kv_cache": WanAnimate2KVCache(1),
        "kv_cache_mode": "extract",
        "seq_len": frames * 16,
        "encoder_hidden_states_image": randn(BATCH, 4, 1280, seed=3),
        "offset_grid_sizes": torch.tensor([[FRAMES, 4, 4]] * BATCH),
    }


def _generation_inputs(layout: Layout, pads: float) -> Inputs:
    inputs = _inputs(layout, pads, FRAMES + 1)
    inputs["kv_cache"].get(0).store(*randn(2, BATCH, FRAMES * 16, HEADS, HEAD_DIM, seed=4))
    return {
        **inputs,
        "kv_cache_mode": "cached",
        "reference_grid_sizes": inputs.pop("offset_grid_sizes"),
        "origin_len": 4 * FRAMES - 3,
        "origin_area": PIXELS,
    }


def _samples(returned: tuple[list[torch.Tensor]]) -> torch.Tensor:
    return torch.stack(returned[0])


CONFIG = {
    "text_len": TEXT + 2,  # the model appends zeros to the text
    "in_dim": 9,
    "dim": HEADS * HEAD_DIM,
    "ffn_dim": 64,
    "freq_dim": 32,
    "text_dim": 16,
    "out_dim": 4,
    "num_heads": HEADS,
    "num_layers": 1,
}

CASES = (
    Case(
        name="wan_animate2_reference",
        model=WanAnimate2Transformer3DModel,
        config=CONFIG,
        inputs=_inputs,
        pick=_samples,
    ),
    Case(
        name="wan_animate2_generation",
        model=Uncompiled,
        config=CONFIG,
        inputs=_generation_inputs,
        pick=_samples,
        unreached=PINNED,
    ),
)
