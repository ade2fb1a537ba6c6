"""The plans of models that make videos, sound and other sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers_fa3.parallel.model_plan import (
    CPPlan,
    ModelPlan,
    gather_output,
    refuse,
    split_input,
    split_output,
)

TOKENS = {"hidden_states": split_input(1, 3)}
JOINT = {**TOKENS, "encoder_hidden_states": split_input(1, 3)}
ROPE = {0: split_output(0, 2), 1: split_output(0, 2)}
"""Outputs of a module for rotary embeddings: cosines and sines, (S, D)."""
GIVEN_ROPE = [split_input(0, 2), split_input(0, 2)]
"""The same, as an argument of a block."""
BATCHED_ROPE = {0: split_output(1, 4), 1: split_output(1, 4)}
"""Cosines and sines, (1, S, 1, D)."""


def _joint(more: CPPlan) -> Callable[[Any], CPPlan]:
    """Text and video, from the first block to the layer behind the last."""
    return lambda model: {"transformer_blocks.0": JOINT, **more, "proj_out": gather_output()}


def _within(blocks: str, more: CPPlan) -> Callable[[Any], CPPlan]:
    """Tokens within blocks alone: what comes behind them needs the whole."""
    return lambda model: {f"{blocks}.0": TOKENS, **more, _last(model, blocks): gather_output()}


def _last(model: Any, blocks: str) -> str:
    return _behind(blocks, len(getattr(model, blocks)) - 1)


def _behind(blocks: str, number: int) -> str:
    # The dot at the end makes a second name of a block, which can have an entry of its own.
    return f"{blocks}.{number}."


def _hunyuan_video(model: Any) -> CPPlan:
    if model.config.get("image_condition_type") == "token_replace":
        refuse(model, "image_condition_type='token_replace' treats the first tokens differently")
    return _joint({"rope": ROPE})(model)


def _framepack(model: Any) -> CPPlan:
    # History is put in front of the video, and cut off behind the last block.
    return {
        "transformer_blocks.0": JOINT,
        "transformer_blocks.*": {"freqs_cis": GIVEN_ROPE},
        "single_transformer_blocks.*": {"image_rotary_emb": GIVEN_ROPE},
        _last(model, "single_transformer_blocks"): [gather_output(), gather_output()],
    }


def _consisid(model: Any) -> CPPlan:
    # Text and video are put together again behind the last block, and cut at the text's length.
    return {
        "transformer_blocks.0": JOINT,
        "transformer_blocks.*": {"image_rotary_emb": GIVEN_ROPE},
        _last(model, "transformer_blocks"): [gather_output(), gather_output()],
    }


def _cosmos(model: Any) -> CPPlan:
    # The embedded time has three axes where every frame has a time of its own.
    times = {"embedded_timestep": split_input(1, 3), "temb": split_input(1, 3)}
    more = {"extra_pos_emb": split_input(1, 3), "controlnet_residual": split_input(1, 3)}
    return {
        "rope": ROPE,
        "transformer_blocks.0": TOKENS,
        "transformer_blocks.*": {**times, **more},
        "norm_out": times,
        "proj_out": gather_output(),
    }


def _kandinsky5(model: Any) -> CPPlan:
    if model.config.get("attention_type") == "nabla":
        refuse(model, "attention_type='nabla' chooses its mask from all queries and keys")
    blocks = "visual_transformer_blocks"
    return {
        f"{blocks}.0": {"visual_embed": split_input(1, 3)},
        f"{blocks}.*": {"rope": split_input(1, 6)},
        _last(model, blocks): gather_output(),
    }


def _kandinsky6(model: Any) -> CPPlan:
    blocks = "visual_transformer_blocks"
    return {
        f"{blocks}.0": {"vis": split_input(1, 3)},
        f"{blocks}.*": {"vis_rope": split_input(0, 5)},
        # All outputs of a block are gathered, or none: of all copies of the audio, each takes one.
        _last(model, blocks): [gather_output(), gather_output()],
        "audio_out_layer": {"audio_embed": split_input(1, 3)},
    }


def _ltx2(model: Any) -> CPPlan:
    """Diffusers' plan with what it lacks; text stays whole, so that its attention sends nothing."""
    split_heads = model.config.get("rope_type") == "split"  # (B, H, S, D) in place of (B, S, D)
    part = split_output(2, 4) if split_heads else split_output(1, 3)
    return {
        "": {**TOKENS, "timestep": split_input(1, 2)},
        "rope": {0: part, 1: part},
        "cross_attn_rope": {0: part, 1: part},
        "proj_out": gather_output(),
    }


def _helios(model: Any) -> CPPlan:
    """Diffusers' plan, for as many blocks as there are."""
    if model.config.get("is_amplify_history"):
        refuse(model, "with is_amplify_history, diffusers takes a rank's tokens for all of them")
    plan: CPPlan = {
        "blocks.*.attn1": {**TOKENS, "rotary_emb": split_input(1, 3)},
        "blocks.*.attn2": TOKENS,
        "blocks.*.ffn": TOKENS,
    }
    for block in range(len(model.blocks)):
        plan |= {f"blocks.{block}.{layer}": gather_output() for layer in ("attn1", "attn2", "ffn")}
    return plan


def _motif_video(model: Any) -> CPPlan:
    # The mask and the decoder's tokens are made of what the embedders return.
    images = (
        {"image_embedder": {0: split_output(1, 3)}} if model.config.get("image_embed_dim") else {}
    )
    return {
        "": {"encoder_attention_mask": split_input(1, 2)},
        "rope": ROPE,
        "x_embedder": {0: split_output(1, 3)},
        "context_embedder": {0: split_output(1, 3)},
        **images,
        "proj_out": gather_output(),
    }


def _cosmos3(model: Any) -> CPPlan:
    # The text stays whole, and its causal attention local. Of the rotary embeddings, two each for
    # text and video, those of the text are named as outputs, which leaves an argument as it is.
    rope = [split_output(0), split_output(0), split_input(0, 2), split_input(0, 2)]
    return {
        "layers.0": {"gen_seq": split_input(0, 2)},
        "layers.*": {"rotary_emb": rope},
        "norm_moe_gen": gather_output(0, 2),
    }


def _wan_animate(model: Any) -> CPPlan:
    # Face blocks need whole frames: behind a block that one follows, tokens are gathered.
    count, every = len(model.blocks), model.config.inject_face_latents_blocks
    whole = {*range(0, count, every), count - 1}
    plan: CPPlan = {_behind("blocks", block): gather_output() for block in sorted(whole)}
    plan |= {f"blocks.{n + 1}": TOKENS for n in (-1, *sorted(whole)) if n + 1 < count}
    return {"rope": BATCHED_ROPE, **plan}


def _wan_vace(model: Any) -> CPPlan:
    # Every block of the control is given the video's tokens as they are in front of all blocks.
    control = {"vace_blocks.0": {"control_hidden_states": split_input(1, 3)}}
    video = {"vace_blocks.*": TOKENS, "blocks.0": TOKENS}
    return {"rope": BATCHED_ROPE, **control, **video, "proj_out": gather_output()}


_HUNYUAN = r"(single_)?transformer_blocks\.\d+\.attn"
_REFINER = r"context_embedder\..*"
_SELF, _CROSS = r"(transformer_)?blocks\.\d+\.attn1", r"(transformer_)?blocks\.\d+\.attn2"
_VIDEO_FIRST = ("hidden_states", "encoder_hidden_states")

VIDEO: dict[str, ModelPlan] = {
    "CogVideoXTransformer3DModel": ModelPlan(
        _joint({"transformer_blocks.*": {"image_rotary_emb": GIVEN_ROPE}}), split=_SELF
    ),
    "ConsisIDTransformer3DModel": ModelPlan(_consisid, split=_SELF, trains=False),
    "Cosmos3OmniTransformer": ModelPlan(
        _cosmos3, split=r"layers\.\d+\.self_attn", whole_first="und_seq", trains=False
    ),
    "CosmosTransformer3DModel": ModelPlan(_cosmos, split=_SELF, local=_CROSS),
    "EasyAnimateTransformer3DModel": ModelPlan(_joint({"rope_embedding": ROPE}), split=_SELF),
    "HeliosTransformer3DModel": ModelPlan(_helios, split=_SELF, local=_CROSS, trains=False),
    "HunyuanVideoTransformer3DModel": ModelPlan(
        _hunyuan_video, split=_HUNYUAN, local=_REFINER, order=_VIDEO_FIRST
    ),
    "HunyuanVideo15Transformer3DModel": ModelPlan(
        # The processor pads the mask of the text to the length of all that the rank has.
        _joint({"transformer_blocks.*": {"attention_mask": split_input(1, 2)}, "rope": ROPE}),
        split=_HUNYUAN,
        local=_REFINER,
    ),
    "HunyuanVideoFramepackTransformer3DModel": ModelPlan(
        _framepack, split=_HUNYUAN, local=_REFINER, order=_VIDEO_FIRST, trains=False
    ),
    "Kandinsky5Transformer3DModel": ModelPlan(
        _kandinsky5,
        split=r"visual_transformer_blocks\.\d+\.self_attention",
        local=r"visual_transformer_blocks\.\d+\.cross_attention|text_transformer_blocks\..*",
        trains=False,
    ),
    "Kandinsky6Transformer3DModel": ModelPlan(
        _kandinsky6,
        split=r"visual_.*\.(video_dec_block\.self_attention|av_cross_attention)",
        local=r"visual_.*\.(video_dec_block\.cross_attention|audio_dec_block\..*"
        r"|va_cross_attention)|(video|audio)_text_.*",
        trains=False,
    ),
    "LTX2VideoTransformer3DModel": ModelPlan(
        _ltx2,
        split=r"transformer_blocks\.\d+\.(attn1|video_to_audio_attn)",
        local=r"transformer_blocks\.\d+\.(attn2|audio_attn1|audio_attn2|audio_to_video_attn)",
        trains=False,
    ),
    "LongCatAudioDiTTransformer": ModelPlan(
        _within("blocks", {"blocks.*": {"mask": split_input(1, 2), "rope": GIVEN_ROPE}}),
        split=r"blocks\.\d+\.self_attn",
        local=r"blocks\.\d+\.cross_attn",
        trains=False,
    ),
    "MiniMaxMusic3Transformer1DModel": ModelPlan(
        _within("transformer_blocks", {"rotary_emb": ROPE}),
        split=r"transformer_blocks\.\d+\.attn",
        trains=False,
    ),
    "MotifVideoTransformer3DModel": ModelPlan(
        _motif_video, split=r"(single_)?transformer_blocks\.\d+\.(cross_)?attn"
    ),
    "SkyReelsV2Transformer3DModel": ModelPlan(
        # With diffusion forcing, every token has a time of its own.
        _within("blocks", {"rope": BATCHED_ROPE, "blocks.*": {"temb": split_input(2, 4)}}),
        split=_SELF,
        local=_CROSS,
        trains=False,
    ),
    "StableAudio3DiTModel": ModelPlan(
        _within("transformer_blocks", {"rotary_pos_emb": {0: split_output(0, 2)}}),
        split=r"transformer_blocks\.\d+\.self_attn",
        local=r"transformer_blocks\.\d+\.cross_attn",
        trains=False,
    ),
    "StableAudioDiTModel": ModelPlan(
        _within(
            "transformer_blocks",
            {
                "transformer_blocks.*": {
                    "attention_mask": split_input(1, 2),
                    "rotary_embedding": GIVEN_ROPE,
                }
            },
        ),
        split=_SELF,
        local=_CROSS,
        trains=False,
    ),
    "WanAnimateTransformer3DModel": ModelPlan(
        _wan_animate,
        split=_SELF,
        local=rf"{_CROSS}|face_adapter\..*|face_encoder\..*",
        trains=False,
    ),
    "WanVACETransformer3DModel": ModelPlan(
        _wan_vace, split=r"(vace_)?blocks\.\d+\.attn1", local=r"(vace_)?blocks\.\d+\.attn2"
    ),
}

_CAUSAL = "its attention is causal, and ranks hold tokens in another order than one process"
_CONVOLUTIONS = "its convolutions, between attention layers, need the neighbours of each token"
_FRAMES = "its attention alternates between the tokens of a frame and the frames of a token"
_LINEAR = "its linear attention and convolutions run over all tokens, outside attention calls"

VIDEO_WHY_NOT: dict[str, str] = {
    "AceStepTransformer1DModel": "half of its layers attend within a window of neighbours",
    "AllegroTransformer3DModel": "its rotary embeddings are nested tuples, which diffusers' hooks "
    "do not split",
    "AnyFlowFARTransformer3DModel": _CAUSAL,
    "AnyFlowTransformer3DModel": "its rotary embeddings are a dictionary, which diffusers' hooks "
    "do not split",
    "AudioLDM2UNet2DConditionModel": _CONVOLUTIONS,
    "CosmosControlNetModel": "it returns the tokens of every block to another model",
    "I2VGenXLUNet": _CONVOLUTIONS,
    "LatteTransformer3DModel": _FRAMES,
    "MiniMaxMusic3RVQDepthDecoder": _CAUSAL,
    "MochiTransformer3DModel": "its attention drops the padded text of each sample, so ranks would "
    "have different numbers of tokens",
    "RFD4ProteinaTransformer": "its attention has a bias for every pair of tokens",
    "SanaVideoTransformer3DModel": _LINEAR,
    "SanaWMLTX2RefinerTransformer3DModel": "its cache of keys holds the tokens of earlier chunks, "
    "which every rank would count again",
    "SanaWMTransformer3DModel": _LINEAR,
    "SparseControlNetModel": _CONVOLUTIONS,
    "T5FilmDecoder": "it computes attention by itself, without a call that could be taken",
    "TransformerTemporalModel": "it attends over the few frames of each pixel",
    "UNet3DConditionModel": _CONVOLUTIONS,
    "UNetMotionModel": _CONVOLUTIONS,
    "UNetSpatioTemporalConditionModel": _CONVOLUTIONS,
    "WanAnimate2Transformer3DModel": "its blocks get the sizes of the whole grid, and a cache of "
    "keys of the reference",
}
"""Why a class can have no plan."""
