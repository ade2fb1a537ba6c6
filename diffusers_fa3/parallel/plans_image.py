"""The plans of models that draw pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diffusers_fa3.parallel.model_plan import (
    CPPlan,
    ModelPlan,
    gather_output,
    refuse,
    split_input,
    split_output,
)

Entry = dict[Any, Any]
"""What is split at one module."""

TOKENS: Entry = {0: split_output(1, 3)}
"""Tokens (B, S, width) that a module makes."""
ANGLES: Entry = {0: split_output(0, 2), 1: split_output(0, 2)}
"""Cosines and sines (S, D) that a module makes."""
COSINES_AND_SINES = [split_input(0, 2), split_input(0, 2)]
"""The same as an argument."""
STREAMS: Entry = {"hidden_states": split_input(1, 3), "encoder_hidden_states": split_input(1, 3)}
"""Image and text as arguments."""
POSITIONS: Entry = {"img_ids": split_input(-2), "txt_ids": split_input(-2)}
"""Positions (S, axes), in old pipelines (B, S, axes)."""

IMAGE_FIRST = ("hidden_states", "encoder_hidden_states")
ONE_STREAM = ("hidden_states",)


def _always(plan: CPPlan) -> Callable[[Any], CPPlan]:
    return lambda _: plan


def _streams(block: str, every: Entry | None = None) -> Callable[[Any], CPPlan]:
    """Image and text are split where the blocks begin, and `every` in each block."""
    blocks = block.removesuffix(".0")
    in_each: CPPlan = {f"{blocks}.*": every} if every else {}
    return _always({**in_each, block: STREAMS, "proj_out": gather_output()})


def _stack(
    model: Any, blocks: str, first: Entry, every: Entry, ends: Sequence[str] = (), dim: int = 1
) -> CPPlan:
    """One stream of tokens, split where a list of blocks begins.

    Args:
        model: the model.
        blocks: the name of the list.
        first: what is split before the first block.
        every: what is split in each block.
        ends: the modules whose outputs are gathered; if none is named, the last block.
        dim: the axis of the tokens in these outputs.
    """
    ends = ends or [f"{blocks}.{len(getattr(model, blocks)) - 1}"]
    plan: CPPlan = {f"{blocks}.*": every, **dict.fromkeys(ends, gather_output(dim))}
    if f"{blocks}.0" in plan:  # the only block, and a name has one entry
        return {**plan, f"{blocks}.*": {**first, **every}}
    return {f"{blocks}.0": first, **plan}


def _sd3(model: Any) -> CPPlan:
    # Not at the first block, which a caller may skip.
    plan: CPPlan = {"pos_embed": TOKENS, "context_embedder": TOKENS, "proj_out": gather_output()}
    if getattr(model, "image_proj", None) is not None:
        # An IP-Adapter's keys stand beside those of the image: they must not be on every rank.
        plan["image_proj"] = TOKENS
    return plan


_as_flux = _always({"": {**STREAMS, **POSITIONS}, "proj_out": gather_output()})

_bria_fibo = _always(
    {
        "": {**STREAMS, **POSITIONS},
        "caption_projection.*": TOKENS,
        "proj_out": gather_output(),
    }
)


def _flux3(model: Any) -> CPPlan:
    plan: CPPlan = {"": STREAMS, "pos_embed": ANGLES, "proj_out": gather_output()}
    reference = "image_cond"
    if reference in model.x_embedders:
        for each in ("x_embedders", "early_stream_modulations", "single_stream_modulations"):
            plan[f"{each}.{reference}"] = TOKENS
    return plan


def _z_image(model: Any) -> CPPlan:
    if getattr(model, "siglip_embedder", None) is not None:
        refuse(model, "the final layer is told which tokens are noisy, of those of one rank")
    last = [f"all_final_layer.{size}" for size in model.all_final_layer]
    return _stack(model, "layers", {"x": split_input(1, 3)}, _PER_TOKEN, last)


def _bria_fibo2(model: Any) -> CPPlan:
    return _stack(model, "layers", {"x": split_input(1, 3)}, _PER_TOKEN)


_PER_TOKEN: Entry = {"freqs_cis": split_input(1, 3), "noise_mask": split_input(1, 2)}


def _lumina2(model: Any) -> CPPlan:
    first = {"hidden_states": split_input(1, 3)}
    return _stack(model, "layers", first, {"image_rotary_emb": split_input(1, 3)}, ["norm_out"])


def _krea2(model: Any) -> CPPlan:
    first = {"hidden_states": split_input(1, 3)}
    return _stack(model, "transformer_blocks", first, {"image_rotary_emb": COSINES_AND_SINES})


def _ernie_image(model: Any) -> CPPlan:
    # Tokens come first here: (S, B, width).
    every = {"rotary_pos_emb": split_input(1, 4), "temb": [split_input(0, 3)] * 6}
    return _stack(model, "layers", {"x": split_input(0, 3)}, every, ["final_linear"], dim=0)


_pixart = _always({"pos_embed": TOKENS, "proj_out": gather_output()})

_dit = _always({"pos_embed": TOKENS, "proj_out_2": gather_output()})

_hunyuan_dit = _always(
    {
        "pos_embed": TOKENS,
        "blocks.*": {"image_rotary_emb": COSINES_AND_SINES},
        "proj_out": gather_output(),
    }
)

_hunyuan_image = _always(
    {"rope": ANGLES, "transformer_blocks.0": STREAMS, "proj_out": gather_output()}
)

_prx = _always(
    {
        "img_in": TOKENS,
        "txt_in": TOKENS,
        "pe_embedder": {0: split_output(2, 6)},
        "blocks.*": {"attention_mask": split_input(1, 2)},
        "final_layer": gather_output(),
    }
)

_ROTARY_AND_TEXT_MASK: Entry = {
    "image_rotary_emb": COSINES_AND_SINES,
    "attention_mask": split_input(1, 2),
}


def _cogview4(model: Any) -> CPPlan:
    processors = {type(block.attn1.processor).__name__ for block in model.transformer_blocks}
    if "CogView4TrainingAttnProcessor" in processors:
        refuse(model, "CogView4TrainingAttnProcessor makes a mask of queries and keys, of a rank's")
    return _streams("transformer_blocks.0", _ROTARY_AND_TEXT_MASK)(model)


_joyimage_edit_plus = _streams(
    "double_blocks.0", {"image_rotary_emb": [split_input(1, 3), split_input(1, 3)]}
)

_FLUX_LAYERS = r"(single_)?transformer_blocks\.\d+\.attn"
_FLUX_ORDER = ("encoder_hidden_states", "hidden_states")

IMAGE: dict[str, ModelPlan] = {
    "AuraFlowTransformer2DModel": ModelPlan(
        _streams("joint_transformer_blocks.0"),
        split=r"(joint|single)_transformer_blocks\.\d+\.attn",
    ),
    "BriaFibo2Transformer2DModel": ModelPlan(
        _bria_fibo2,
        split=r"layers\.\d+\.attention",
        local=r"layers\.\d+\.cross_attention|(perceiver|noise_refiner)\..+",
        order=ONE_STREAM,
        trains=False,
    ),
    "BriaFiboTransformer2DModel": ModelPlan(_bria_fibo, split=_FLUX_LAYERS, order=_FLUX_ORDER),
    "BriaTransformer2DModel": ModelPlan(_as_flux, split=_FLUX_LAYERS),
    "ChromaTransformer2DModel": ModelPlan(_as_flux, split=_FLUX_LAYERS, order=_FLUX_ORDER),
    "CogView3PlusTransformer2DModel": ModelPlan(
        _streams("transformer_blocks.0"), split=r"transformer_blocks\.\d+\.attn1"
    ),
    "CogView4Transformer2DModel": ModelPlan(_cogview4, split=r"transformer_blocks\.\d+\.attn1"),
    "DiTTransformer2DModel": ModelPlan(_dit, split=r"transformer_blocks\.\d+\.attn1"),
    "ErnieImageTransformer2DModel": ModelPlan(
        _ernie_image, split=r"layers\.\d+\.self_attention", order=ONE_STREAM
    ),
    "Flux3Transformer2DModel": ModelPlan(
        _flux3,
        split=r"(txt_mode_blocks|mode_blocks\.\w+|single_transformer_blocks)\.\d+\.attn",
    ),
    "GlmImageTransformer2DModel": ModelPlan(
        _streams("transformer_blocks.0", _ROTARY_AND_TEXT_MASK),
        split=r"transformer_blocks\.\d+\.attn1",
    ),
    "HunyuanDiT2DModel": ModelPlan(
        _hunyuan_dit, split=r"blocks\.\d+\.attn1", local=r"blocks\.\d+\.attn2"
    ),
    "HunyuanImageTransformer2DModel": ModelPlan(
        _hunyuan_image,
        split=_FLUX_LAYERS,
        local=r"context_embedder\..+",
        order=IMAGE_FIRST,
    ),
    "JoyImageEditPlusTransformer3DModel": ModelPlan(
        _joyimage_edit_plus, split=r"double_blocks\.\d+\.attn", order=IMAGE_FIRST
    ),
    "Krea2Transformer2DModel": ModelPlan(
        _krea2,
        split=r"transformer_blocks\.\d+\.attn",
        local=r"text_fusion\..+",
        order=ONE_STREAM,
        trains=False,
    ),
    "LongCatImageTransformer2DModel": ModelPlan(_as_flux, split=_FLUX_LAYERS),
    "Lumina2Transformer2DModel": ModelPlan(
        _lumina2,
        split=r"layers\.\d+\.attn",
        local=r"(context|noise)_refiner\..+",
        order=ONE_STREAM,
    ),
    "OvisImageTransformer2DModel": ModelPlan(_as_flux, split=_FLUX_LAYERS, order=_FLUX_ORDER),
    "PRXTransformer2DModel": ModelPlan(_prx, split=r"blocks\.\d+\.attention"),
    "PixArtTransformer2DModel": ModelPlan(
        _pixart,
        split=r"transformer_blocks\.\d+\.attn1",
        local=r"transformer_blocks\.\d+\.attn2",
    ),
    "SD3Transformer2DModel": ModelPlan(_sd3, split=r"transformer_blocks\.\d+\.attn2?"),
    "ZImageTransformer2DModel": ModelPlan(
        _z_image,
        split=r"layers\.\d+\.attention",
        local=r"(context|noise|siglip)_refiner\..+",
        order=ONE_STREAM,
    ),
}

_CONTROLNET = "what it returns is added to the tokens of another model, which no plan splits"
_CONVOLUTIONS = "its convolutions, between attention layers, need the neighbours of each token"
_LINEAR = "its linear attention and convolutions run over all tokens, outside attention calls"
_QUERIES_AND_KEYS = "its mask depends on queries and keys; a rank has those of its own tokens only"

IMAGE_WHY_NOT: dict[str, str] = {
    "ControlNetModel": _CONVOLUTIONS,
    "ControlNetUnionModel": _CONVOLUTIONS,
    "DreamLiteTransformer2DModel": "it is a part of a UNet, and its norm runs over the whole image",
    "DreamLiteUNetModel": _CONVOLUTIONS,
    "FluxControlNetModel": _CONTROLNET,
    "HiDreamImageTransformer2DModel": "it puts the positions of image and text together inside its "
    "forward, where no plan splits each",
    "HunyuanDiT2DControlNetModel": _CONTROLNET,
    "Ideogram4Transformer2DModel": _QUERIES_AND_KEYS,
    "JoyImageEditTransformer3DModel": "its rotary embeddings are nested tuples, which diffusers' "
    "hooks do not split",
    "Kandinsky3UNet": _CONVOLUTIONS,
    "Kandinsky6SRTransformer3DModel": "its mask follows from blocks of neighbouring tokens, and it "
    "calls flex_attention",
    "LuminaNextDiT2DModel": "the scale of its attention follows from the number of tokens, and its "
    "processor would take that of one rank",
    "NucleusMoEImageTransformer2DModel": "its experts choose among all tokens of an image",
    "OmniGenTransformer2DModel": _QUERIES_AND_KEYS,
    "PriorTransformer": _QUERIES_AND_KEYS,
    "QwenImage21Transformer2DModel": _QUERIES_AND_KEYS,
    "QwenImageControlNetModel": _CONTROLNET,
    "SD3ControlNetModel": _CONTROLNET,
    "SanaControlNetModel": _LINEAR,
    "SanaTransformer2DModel": _LINEAR,
    "StableCascadeUNet": _CONVOLUTIONS,
    "UNet2DConditionModel": _CONVOLUTIONS,
    "UNet2DModel": _CONVOLUTIONS,
    "UNetControlNetXSModel": _CONVOLUTIONS,
    "UVit2DModel": _CONVOLUTIONS,
    "ZImageControlNetModel": _CONTROLNET,
}
"""Why a class can have no plan."""
