"""Helios: no masks. Tokens of past frames, coarser the longer ago, come before those to denoise.

Self attention is over both; cross attention is for the tokens to denoise alone.
"""

from __future__ import annotations

import torch
from diffusers import HeliosTransformer3DModel

from .case import BATCH, Case, Inputs, Layout, randn
from .wan import CONFIG, inputs

HISTORY = {"long": 4, "mid": 2, "short": 1}  # frames, the oldest first


def _inputs(layout: Layout, pads: float) -> Inputs:
    found = inputs(layout, pads)
    start = 0
    for seed, (term, frames) in enumerate(HISTORY.items(), start=2):
        found[f"latents_history_{term}"] = randn(BATCH, 4, frames, 8, 8, seed=seed)
        found[f"indices_latents_history_{term}"] = _indices(start, frames)
        start += frames
    return {**found, "indices_hidden_states": _indices(start, 2)}


def _indices(start: int, frames: int) -> torch.Tensor:
    return torch.arange(start, start + frames).expand(BATCH, frames)


CASES = (
    Case(
        name="helios",
        model=HeliosTransformer3DModel,
        config={
            **{name: value for name, value in CONFIG.items() if name != "rope_max_seq_len"},
            "is_amplify_history": True,
        },
        inputs=_inputs,
    ),
)
