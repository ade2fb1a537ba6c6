"""Video and audio models as they are split over ranks: the zoo's cases, with fitted inputs.

All numbers of tokens that are split divide by 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from inspect import signature

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from releases import has
from zoo import CASES as ZOO
from zoo.case import BATCH, Case, Inputs, Layout, prompt, randn, timesteps

from diffusers_fa3.parallel.plans_video import VIDEO

OF_DIFFUSERS = {"wan_t2v", "chronoedit", "ltx", "minimax_h3"}
"""Cases of classes whose plan in diffusers is right."""
if has("0.37.0"):  # before, the tokens of an image were split too, and their number does not divide
    OF_DIFFUSERS.add("wan_i2v")

Fit = Callable[[Inputs, Layout, float], Inputs]
"""(a case's own inputs, layout, pads) -> what takes their place."""


def _framepack(given: Inputs, layout: Layout, pads: float) -> Inputs:
    # 64 tokens, behind 4, 16 and 128 of the history; 4 of the image in front of the text.
    batch = len(given["hidden_states"])
    return {
        "hidden_states": randn(batch, 4, 1, 16, 16),
        "latents_clean": randn(batch, 4, 2, 16, 16, seed=3),
        "latents_history_2x": randn(batch, 4, 2, 16, 16, seed=4),
        "latents_history_4x": randn(batch, 4, 4, 16, 16, seed=5),
        "image_embeds": randn(batch, 4, 12, seed=6),
    }


def _hunyuan_video15(given: Inputs, layout: Layout, pads: float) -> Inputs:
    # 4 tokens of the image, 8 of glyphs, 12 of text.
    glyphs, mask = prompt(layout, 8, pads, length=8, seed=3)
    some = 1.0 if given["image_embeds"].any() else 0.0
    return {
        "encoder_hidden_states_2": glyphs,
        "encoder_attention_mask_2": mask,
        "image_embeds": some * randn(BATCH, 4, 12, seed=4),
    }


def _motif_video(given: Inputs, layout: Layout, pads: float) -> Inputs:
    return {"image_embeds": randn(BATCH, 4, 12, seed=2)}


def _minimax_h3(given: Inputs, layout: Layout, pads: float) -> Inputs:
    # 2 tokens of text less, which leaves 32 tokens.
    start = ("token_tags", "timestep_indices", "position_ids")
    return {
        "encoder_hidden_states": given["encoder_hidden_states"][:, 2:],
        **{name: given[name][2:] for name in start},
        **{name: given[name] - 2 for name in ("video_indices", "audio_indices")},
        "text_indices": given["text_indices"][2:] - 2,
    }


def _minimax_music3(given: Inputs, layout: Layout, pads: float) -> Inputs:
    # A token of the time is put in front.
    return {
        name: given[name][..., :11] if name == "hidden_states" else given[name][:, :11]
        for name in ("hidden_states", "encoder_hidden_states")
    }


def _stable_audio(given: Inputs, layout: Layout, pads: float) -> Inputs:
    # A token of the global states is put in front.
    mask = given.get("attention_mask")
    rope = get_1d_rotary_pos_embed(32, 12, use_real=True, repeat_interleave_real=False)
    return {
        "hidden_states": given["hidden_states"][..., :11],
        "rotary_embedding": rope,
        **({} if mask is None else {"attention_mask": mask[:, :11]}),
    }


def _helios(given: Inputs, layout: Layout, pads: float) -> Inputs:
    # 128 tokens, behind 4, 16 and 64 of the history.
    frames = {"hidden_states": 2} | {
        f"latents_history_{n}": given[f"latents_history_{n}"].shape[2]
        for n in ("long", "mid", "short")
    }
    return {name: randn(BATCH, 4, n, 16, 16, seed=n) for name, n in frames.items()}


def _time_of_tokens(given: Inputs, layout: Layout, pads: float) -> Inputs:
    times = timesteps(1000)
    tokens = given["hidden_states"].shape[1]
    return {"timestep": times[:, None] * torch.linspace(0.0, 1.0, tokens), "audio_timestep": times}


def _time_of_frames(given: Inputs, layout: Layout, pads: float) -> Inputs:
    return {
        "timestep": torch.linspace(100.0, 900.0, BATCH * 2).view(BATCH, 2),
        "enable_diffusion_forcing": True,
    }


def _controlled(given: Inputs, layout: Layout, pads: float) -> Inputs:
    return {"block_controlnet_hidden_states": [randn(BATCH, 32, 256, seed=7)]}


FITS: dict[str, Fit] = {
    "hunyuan_video_framepack": _framepack,
    "hunyuan_video_framepack_alone": _framepack,
    "hunyuan_video15_t2v": _hunyuan_video15,
    "hunyuan_video15_i2v": _hunyuan_video15,
    "minimax_h3": _minimax_h3,
    "minimax_music3": _minimax_music3,
    "motif_video": _motif_video,
    "stable_audio": _stable_audio,
    "stable_audio_padded_audio": _stable_audio,
}


def _fitted(case: Case, fit: Fit) -> Case:
    def inputs(layout: Layout, pads: float) -> Inputs:
        given = case.inputs(layout, pads)
        return {**given, **fit(given, layout, pads)}

    return replace(case, inputs=inputs)


def _more() -> list[Case]:
    """What a plan treats in a way of its own, and the zoo has no case of."""
    known = {case.name: case for case in ZOO}
    found = []
    for name, new_name, config, fit in (
        ("helios", "helios_plain", {"is_amplify_history": False, "num_layers": 2}, _helios),
        ("cosmos", "cosmos_controlled", {"controlnet_block_every_n": 1}, _controlled),
        ("ltx2", "ltx2_time_of_tokens", {}, _time_of_tokens),
        ("skyreels_v2", "skyreels_v2_forcing", {}, _time_of_frames),
        (
            "wan_animate",
            "wan_animate_rarely",
            {"num_layers": 4, "inject_face_latents_blocks": 2},
            lambda *_: {},
        ),
    ):
        case = known.get(name)
        # An older diffusers may lack one of the options.
        if case is not None and config.keys() <= signature(case.model.__init__).parameters.keys():
            new = replace(case, name=new_name, config={**case.config, **config})
            found.append(_fitted(new, fit))
    return found


CASES: tuple[Case, ...] = tuple(
    _fitted(case, FITS[case.name]) if case.name in FITS else case
    for case in ZOO
    if case.model.__name__ in VIDEO or case.name in OF_DIFFUSERS
) + tuple(_more())

REFUSED: dict[str, str] = {
    "helios": r"is_amplify_history",
    "kandinsky5_nabla": r"nabla",
    "ltx2_references": r"a mask of",
    "ltx2_references_strength": r"a mask of",
    "skyreels_v2_causal": r"a mask of",
}
"""Cases, or "case/layout", that are refused by design, and what the message matches."""
