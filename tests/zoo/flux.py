"""FLUX.1, with an IP-Adapter and as a ControlNet: no mask of its own.

A caller may pass one over [text, image]; it reaches every joint call of the transformer, while the
IP-Adapter's extra call, image queries over image-prompt keys, has none. The ControlNet passes no
attention kwargs on.
"""

from __future__ import annotations

import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import nn

from .case import ANY_MASK, BATCH, TEXT, Case, Inputs, Layout, prompt, randn, timesteps

IMAGE = 16
TEXT_WIDTH = 32
PROMPT_IMAGE_WIDTH = 16
PROMPT_IMAGE_TOKENS = 4

CONFIG = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 128,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "axes_dims_rope": (16, 56, 56),
}
"""What FLUX.1 and its relatives have in common."""


def position_ids() -> Inputs:
    """Return the (tokens, 3) positions of text and of a 4 x 4 image."""
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    image = torch.stack([torch.zeros(IMAGE), rows.flatten(), columns.flatten()], dim=-1)
    return {"txt_ids": torch.zeros(TEXT, 3), "img_ids": image}


def joint_mask(mask: torch.Tensor) -> torch.Tensor:
    """Return the text mask followed by the image tokens, which are all valid."""
    return torch.cat([mask, mask.new_ones(BATCH, IMAGE)], dim=1)


def mask_kwargs(mask: torch.Tensor | None) -> Inputs | None:
    """Return the attention kwargs by which a caller masks the text."""
    return None if mask is None else {"attention_mask": joint_mask(mask)[:, None, None, :]}


def joint_inputs(layout: Layout, pads: float) -> tuple[Inputs, torch.Tensor | None]:
    """Return what FLUX.1 and its relatives all take, and the mask of the text."""
    text, mask = prompt(layout, TEXT_WIDTH, pads)
    inputs = {
        "hidden_states": randn(BATCH, IMAGE, 4),
        "encoder_hidden_states": text,
        "timestep": timesteps(),
        **position_ids(),
    }
    return inputs, mask


def add_ip_adapter(transformer: nn.Module) -> None:
    """Load a random IP-Adapter the way diffusers' loader does: processors with weights."""
    transformer.set_attn_processor(
        {
            name: FluxIPAdapterAttnProcessor(
                transformer.inner_dim, TEXT_WIDTH, num_tokens=(PROMPT_IMAGE_TOKENS,)
            )
            if name.startswith("transformer_blocks")
            else processor
            for name, processor in transformer.attn_processors.items()
        }
    )
    projection = ImageProjection(
        PROMPT_IMAGE_WIDTH, TEXT_WIDTH, num_image_text_embeds=PROMPT_IMAGE_TOKENS
    )
    transformer.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    transformer.register_to_config(encoder_hid_dim_type="ip_image_proj")


def _inputs(layout: Layout, pads: float) -> Inputs:
    inputs, mask = joint_inputs(layout, pads)
    return {
        **inputs,
        "pooled_projections": randn(BATCH, 32, seed=2),
        "joint_attention_kwargs": mask_kwargs(mask),
    }


def _ip_adapter_inputs(layout: Layout, pads: float) -> Inputs:
    inputs = _inputs(layout, pads)
    embeds = randn(BATCH, 1, PROMPT_IMAGE_WIDTH, seed=3)
    kwargs = {**(inputs["joint_attention_kwargs"] or {}), "ip_adapter_image_embeds": [embeds]}
    return {**inputs, "joint_attention_kwargs": kwargs}


def _controlnet_inputs(layout: Layout, pads: float) -> Inputs:
    return {**_inputs(layout, pads), "controlnet_cond": randn(BATCH, IMAGE, 4, seed=3)}


CASES = (
    Case(
        name="flux",
        model=FluxTransformer2DModel,
        config={**CONFIG, "pooled_projection_dim": 32},
        inputs=_inputs,
        layouts=ANY_MASK,
    ),
    Case(
        name="flux_ip_adapter",
        model=FluxTransformer2DModel,
        config={**CONFIG, "pooled_projection_dim": 32},
        inputs=_ip_adapter_inputs,
        layouts=("none", "ragged"),
        prepare=add_ip_adapter,
    ),
    Case(
        name="flux_controlnet",
        model=FluxControlNetModel,
        config={**CONFIG, "pooled_projection_dim": 32},
        inputs=_controlnet_inputs,
        pick=lambda returned: torch.cat([*returned[0], *returned[1]]),
    ),
)
