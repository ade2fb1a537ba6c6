"""LTX-2, video and audio: text masks as in LTX-Video; the video may mask its self attention.

That mask, (B, H, T, T) and additive, is what LTX-2's pipeline for references makes: the noisy
tokens see everything, keyframes see all but the references, and each group of references sees the
noisy tokens and itself. Each reference token has a strength; one between 0 and 1 makes a bias, -1e4
times what is missing to 1, which is no mask. LTX-2.3 computes self attention for the samples that
are to be perturbed as well, and then puts the values in its place. Where all samples are, it does
without the call.
"""

from __future__ import annotations

import torch
from diffusers import LTX2VideoTransformer3DModel

from .case import ANY_MASK, BATCH, Case, Inputs, Layout, Refusal, prompt, randn, timesteps
from .minimax_h3 import both

NOISY, KEYFRAME, REFERENCES = 16, 4, (8, 4)  # tokens of the video
VIDEO = NOISY + KEYFRAME + sum(REFERENCES)
AUDIO = 6
HEADS = 2
HEAD_DIM, AUDIO_HEAD_DIM = 128, 64
WIDTH, AUDIO_WIDTH = HEADS * HEAD_DIM, HEADS * AUDIO_HEAD_DIM


def self_mask(strength: torch.Tensor) -> torch.Tensor:
    """Return the mask (B, T, T) for a strength (R,) of each reference token."""
    noisy, keyframe, *groups = torch.arange(VIDEO).split((NOISY, KEYFRAME, *REFERENCES))
    mask = torch.zeros(VIDEO, VIDEO)
    for tokens in (torch.cat([noisy, keyframe]), *groups):
        mask[tokens[:, None], tokens] = 1.0
    mask[:NOISY, NOISY + KEYFRAME :] = strength
    mask[NOISY + KEYFRAME :, :NOISY] = strength[:, None]
    return mask.expand(BATCH, -1, -1)


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, 16, pads)
    return {
        "hidden_states": randn(BATCH, VIDEO, 4),
        "audio_hidden_states": randn(BATCH, AUDIO, 4, seed=2),
        "encoder_hidden_states": text,
        "audio_encoder_hidden_states": text,
        "timestep": timesteps(1000),
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "audio_num_frames": AUDIO,
    }


def _references_inputs(layout: Layout, pads: float) -> Inputs:
    strength = torch.ones(sum(REFERENCES))
    return {**_inputs(layout, pads), "video_self_attention_mask": self_mask(strength)}


def _strength_inputs(layout: Layout, pads: float) -> Inputs:
    if layout == "all_true":
        mask = torch.ones(BATCH, VIDEO, VIDEO)
    else:
        mask = self_mask(torch.linspace(0.0, 1.0, sum(REFERENCES)))
    return {**_inputs(layout, pads), "video_self_attention_mask": mask}


def _perturbed_inputs(layout: Layout, pads: float) -> Inputs:
    text, _ = prompt(layout, WIDTH, pads)
    return {
        **_inputs(layout, pads),
        "encoder_hidden_states": text,
        "audio_encoder_hidden_states": text[..., :AUDIO_WIDTH],
        "sigma": timesteps(1000),
        "use_cross_timestep": True,
        "spatio_temporal_guidance_blocks": [0],
        "perturbation_mask": torch.arange(BATCH) % 2.0,  # 0: perturbed
    }


CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "cross_attention_dim": WIDTH,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": HEADS,
    "audio_attention_head_dim": AUDIO_HEAD_DIM,
    "audio_cross_attention_dim": AUDIO_WIDTH,
    "num_layers": 1,
    "caption_channels": 16,
}
CONFIG_23 = {
    **CONFIG,
    "gated_attn": True,
    "audio_gated_attn": True,
    "cross_attn_mod": True,
    "audio_cross_attn_mod": True,
    "perturbed_attn": True,
    "use_prompt_embeddings": False,
    "rope_type": "split",
}

CASES = (
    Case(
        name="ltx2",
        model=LTX2VideoTransformer3DModel,
        config=CONFIG,
        inputs=_inputs,
        layouts=ANY_MASK,
        pick=both,
    ),
    Case(
        name="ltx2_references",
        model=LTX2VideoTransformer3DModel,
        config=CONFIG,
        inputs=_references_inputs,
        layouts=("none", "ragged"),
        pick=both,
    ),
    Case(
        name="ltx2_references_strength",
        model=LTX2VideoTransformer3DModel,
        config=CONFIG,
        inputs=_strength_inputs,
        layouts=("all_true", "ragged"),
        pick=both,
        refusal=Refusal(layer=r"\.attn1$", reason=r"bias"),
    ),
    Case(
        name="ltx2_perturbed",
        model=LTX2VideoTransformer3DModel,
        config=CONFIG_23,
        inputs=_perturbed_inputs,
        layouts=("none", "ragged"),
        pick=both,
    ),
    Case(
        name="ltx2_perturbed_throughout",
        model=LTX2VideoTransformer3DModel,
        config=CONFIG_23,
        inputs=lambda layout, pads: {**_perturbed_inputs(layout, pads), "perturbation_mask": None},
        layouts=("none", "ragged"),
        pick=both,
    ),
)
