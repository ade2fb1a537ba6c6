"""HunyuanDiT and its ControlNet: no attention mask, whatever the text masks say.

Both text masks are required, but only put a learned embedding in the place of padded tokens; the
cases pad, so that it is used. One more call, of a single query, pools the T5 text in
`torch.nn.functional.multi_head_attention_forward`: no processor makes it.
"""

from __future__ import annotations

import torch
from diffusers import HunyuanDiT2DControlNetModel, HunyuanDiT2DModel
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from torch import nn

from .case import BATCH, TEXT, Case, Inputs, Layout, prompt, randn, timesteps

TEXT_T5 = 6
HEAD_DIM = 88
HEADS = 2


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt("ragged", 16)
    text_t5, mask_t5 = prompt("ragged", 16, length=TEXT_T5, seed=2)
    return {
        "hidden_states": randn(BATCH, 4, 8, 8),
        "timestep": timesteps(1000),
        "encoder_hidden_states": text,
        "text_embedding_mask": mask,
        "encoder_hidden_states_t5": text_t5,
        "text_embedding_mask_t5": mask_t5,
        "image_meta_size": torch.tensor([[1024, 1024, 1024, 1024, 0, 0]] * BATCH),
        "style": torch.zeros(BATCH, dtype=torch.long),
        "image_rotary_emb": get_2d_rotary_pos_embed(
            HEAD_DIM, ((0, 0), (4, 4)), (4, 4), output_type="pt"
        ),
    }


def _controlnet_inputs(layout: Layout, pads: float) -> Inputs:
    return {**_inputs(layout, pads), "controlnet_cond": randn(BATCH, 4, 8, 8, seed=3)}


def fuse_projections(transformer: nn.Module) -> None:
    """Project q, k and v in one layer, which brings a processor of its own."""
    transformer.fuse_qkv_projections()


SHARED = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "hidden_size": HEADS * HEAD_DIM,
    "in_channels": 4,
    "patch_size": 2,
    "sample_size": 8,
    "mlp_ratio": 1.0,
    "cross_attention_dim": 16,
    "cross_attention_dim_t5": 16,
    "pooled_projection_dim": 8,
    "text_len": TEXT,
    "text_len_t5": TEXT_T5,
}
CONFIG = {**SHARED, "num_layers": 4}  # fewer have no block with a skip connection

CASES = (
    Case(
        name="hunyuan_dit",
        model=HunyuanDiT2DModel,
        config=CONFIG,
        inputs=_inputs,
        outside=1,
    ),
    Case(
        name="hunyuan_dit_fused_projections",
        model=HunyuanDiT2DModel,
        config=CONFIG,
        inputs=_inputs,
        prepare=fuse_projections,
        outside=1,
    ),
    Case(
        name="hunyuan_dit_controlnet",
        model=HunyuanDiT2DControlNetModel,
        config={**SHARED, "transformer_num_layers": 6},  # makes two blocks
        inputs=_controlnet_inputs,
        pick=lambda returned: torch.cat(returned[0]),  # the residuals of all blocks
        outside=1,
    ),
)
