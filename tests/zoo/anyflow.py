"""AnyFlow: Wan's blocks with a source and a target time for every frame; no masks."""

from __future__ import annotations

from diffusers import AnyFlowTransformer3DModel

from .case import BATCH, TEXT, Case, Inputs, Layout, randn, timesteps
from .wan import CONFIG


def _inputs(layout: Layout, pads: float) -> Inputs:
    times = timesteps(1000)[:, None].expand(BATCH, 2)
    return {
        "hidden_states": randn(BATCH, 2, 4, 8, 8),  # frames before channels
        "timestep": times,
        "r_timestep": times / 2,
        "encoder_hidden_states": randn(BATCH, TEXT, 16, seed=1),
    }


CASES = (Case(name="anyflow", model=AnyFlowTransformer3DModel, config=CONFIG, inputs=_inputs),)
