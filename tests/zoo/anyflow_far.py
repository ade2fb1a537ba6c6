"""AnyFlow FAR: chunks of frames, causal from chunk to chunk, the oldest ones in coarser tokens.

Self attention is pinned to flex_attention and raises on any other backend. A rollout masks by a
BlockMask: a query sees its own chunk and those before it. A step of inference passes no mask; its
queries see all the cached keys, their own, and the zeros that the processor pads them with, up to a
multiple of 128. Cross attention is as in AnyFlow.
"""

from __future__ import annotations

from diffusers import AnyFlowFARTransformer3DModel

from .case import BATCH, TEXT, Case, Inputs, Layout, randn, timesteps
from .wan import CONFIG

CHUNKS = [1, 1, 1]  # frames of each chunk: the first in 2x2 tokens, the others in 4x4
PINNED = "self attention is pinned to flex_attention; only the cross attention is switched"


def _inputs(layout: Layout, pads: float, frames: int = sum(CHUNKS)) -> Inputs:
    times = timesteps(1000)[:, None].expand(BATCH, frames)
    return {
        "hidden_states": randn(BATCH, frames, 4, 8, 8),  # frames before channels
        "timestep": times,
        "r_timestep": times / 2,
        "encoder_hidden_states": randn(BATCH, TEXT, 16, seed=1),
        "chunk_partition": CHUNKS,
    }


def _cached_inputs(layout: Layout, pads: float) -> Inputs:
    cache = {
        "compressed_cache": randn(2, BATCH, 2, 4, 128),
        "full_cache": randn(2, BATCH, 2, 16, 128),
    }
    return {
        **_inputs(layout, pads, frames=1),
        "kv_cache": [cache],
        "kv_cache_flag": {"is_cache_step": False, "num_cached_chunks": len(CHUNKS) - 1},
    }


FAR_CONFIG = {**CONFIG, "compressed_patch_size": (1, 4, 4), "full_chunk_limit": 2}

CASES = (
    Case(
        name="anyflow_far",
        model=AnyFlowFARTransformer3DModel,
        config=FAR_CONFIG,
        inputs=_inputs,
        unreached=PINNED,
    ),
    Case(
        name="anyflow_far_kv_cache",
        model=AnyFlowFARTransformer3DModel,
        config=FAR_CONFIG,
        inputs=_cached_inputs,
        unreached=PINNED,
    ),
)
