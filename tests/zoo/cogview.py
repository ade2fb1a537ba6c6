"""CogView3-Plus and CogView4: [text, image].

CogView3-Plus passes no mask. CogView4 makes outer(valid, valid) of a text mask, as floats 0 and 1,
which are added to the scores: a bias that hides nothing (huggingface/diffusers#13621). Its
processor for training masks outer(valid, valid) as bool, so padded query rows are empty, or packs
samples into one row, without pads, as blocks on the diagonal.
"""

from __future__ import annotations

import torch
from diffusers import CogView3PlusTransformer2DModel, CogView4Transformer2DModel
from diffusers.models.transformers.transformer_cogview4 import CogView4TrainingAttnProcessor
from torch import nn

from .case import ANY_MASK, BATCH, Case, Inputs, Layout, Refusal, prompt, randn, timesteps

IMAGE = 16
HEAD_DIM = 40


def for_training(model: nn.Module) -> None:
    """Set the processor with which CogView4 is trained."""
    for block in model.transformer_blocks:
        block.attn1.set_processor(CogView4TrainingAttnProcessor())


def _joint_inputs(layout: Layout, pads: float) -> tuple[Inputs, torch.Tensor | None]:
    text, mask = prompt(layout, 16, pads)
    size = torch.full((BATCH, 2), 64)
    inputs = {
        "hidden_states": randn(BATCH, 4, 8, 8),
        "encoder_hidden_states": text,
        "timestep": timesteps(1000),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros_like(size),
    }
    return inputs, mask


def _inputs(layout: Layout, pads: float) -> Inputs:
    return _joint_inputs(layout, pads)[0]


def _mask_inputs(layout: Layout, pads: float) -> Inputs:
    inputs, mask = _joint_inputs(layout, pads)
    return {**inputs, "attention_mask": mask}


def _training_inputs(layout: Layout, pads: float) -> Inputs:
    inputs, mask = _joint_inputs(layout, pads)
    return {**inputs, "attention_kwargs": {"text_attn_mask": None if mask is None else mask.int()}}


def _packed_inputs(layout: Layout, pads: float) -> Inputs:
    inputs = _training_inputs(layout, pads)
    inputs["attention_kwargs"]["batch_flag"] = torch.zeros(BATCH, dtype=torch.long)
    angles = [randn(IMAGE, HEAD_DIM, seed=2 + i) for i in range(BATCH)]
    return {**inputs, "image_rotary_emb": [(angle.cos(), angle.sin()) for angle in angles]}


CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": HEAD_DIM,
    "num_attention_heads": 2,
    "text_embed_dim": 16,
    "time_embed_dim": 16,
    "condition_dim": 8,
}

CASES = (
    Case(
        name="cogview3plus",
        model=CogView3PlusTransformer2DModel,
        config={**CONFIG, "pos_embed_max_size": 8},
        inputs=_inputs,
    ),
    Case(
        name="cogview4",
        model=CogView4Transformer2DModel,
        config=CONFIG,
        inputs=_inputs,
    ),
    Case(
        name="cogview4_mask",
        model=CogView4Transformer2DModel,
        config=CONFIG,
        inputs=_mask_inputs,
        layouts=("all_true", "ragged"),
        refusal=Refusal(layer=r"attn1", reason=r"bias"),
        pads=False,
    ),
    Case(
        name="cogview4_training",
        model=CogView4Transformer2DModel,
        config=CONFIG,
        inputs=_training_inputs,
        layouts=ANY_MASK,
        prepare=for_training,
    ),
    Case(
        name="cogview4_training_packed",
        model=CogView4Transformer2DModel,
        config=CONFIG,
        inputs=_packed_inputs,
        layouts=("all_true", "ragged"),
        prepare=for_training,
    ),
)
