"""Image models as they are split over ranks: the zoo's cases, with inputs that divide by 4."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffusers.models.embeddings import IPAdapterTimeImageProjection
from torch import nn
from zoo import CASES as ZOO
from zoo import Case, Layout
from zoo.case import BATCH, Inputs, prompt, randn
from zoo.sd3 import PROMPT_IMAGE, WIDTH, add_ip_adapter

from diffusers_fa3.parallel.plans_image import IMAGE

RANKS = 4


def _lumina2_inputs(layout: Layout, pads: float) -> Inputs:
    """The longest text has as many words as divide: its pads are no tokens."""
    inputs = _zoo_inputs("lumina2", layout, pads)
    if layout == "ragged":
        inputs["encoder_attention_mask"][0] = True
    return inputs


def _glyph_inputs(layout: Layout, pads: float) -> Inputs:
    glyphs, mask = prompt(layout, 8, pads, length=8, seed=2)
    return {
        **_zoo_inputs("hunyuan_image_glyphs", layout, pads),
        "encoder_hidden_states_2": glyphs,
        "encoder_attention_mask_2": mask,
    }


def _cache_inputs(layout: Layout, pads: float) -> Inputs:
    """`*_anything` does not split a text without any words, as condition images have."""
    inputs = _zoo_inputs("glm_image_kv_cache", layout, pads)
    inputs["condition"]["encoder_hidden_states"] = randn(BATCH, RANKS, 16, seed=4)
    return inputs


def _add_ip_adapter(transformer: nn.Module) -> None:
    add_ip_adapter(transformer)
    transformer.image_proj = IPAdapterTimeImageProjection(
        embed_dim=PROMPT_IMAGE[1], output_dim=WIDTH, hidden_dim=64, heads=1, num_queries=RANKS
    )


def _zoo_inputs(name: str, layout: Layout, pads: float) -> Inputs:
    return next(case for case in ZOO if case.name == name).inputs(layout, pads)


CHANGES: dict[str, dict[str, Any]] = {
    "hunyuan_image_glyphs": {"inputs": _glyph_inputs},
    "glm_image_kv_cache": {"inputs": _cache_inputs},
    "lumina2": {"inputs": _lumina2_inputs},
    "sd3_ip_adapter": {"prepare": _add_ip_adapter},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bria_fibo2": {"gist_step": 4},  # 8 words make 8 gist tokens
    "lumina2": {"hidden_size": 192, "num_attention_heads": 2},  # 2 ranks can share the heads
}
"""What differs from the zoo, so that everything that is split divides by `RANKS`."""


def _has_plan(case: Case) -> bool:
    return any(base.__name__ in IMAGE for base in case.model.__mro__)


def _fitted(case: Case) -> Case:
    config = {**case.config, **CONFIGS.get(case.name, {})}
    return replace(case, config=config, **CHANGES.get(case.name, {}))


CASES: tuple[Case, ...] = tuple(_fitted(case) for case in ZOO if _has_plan(case))

_OF_QUERIES = r"a mask of queries and keys"
_OF_ALL_TOKENS = r"a mask of \d+ keys on a rank that has"
REFUSED: dict[str, str] = {
    "bria_fibo_outer_mask": rf"{_OF_QUERIES}|{_OF_ALL_TOKENS}",
    "cogview4_mask": _OF_QUERIES,
    "cogview4_training": r"CogView4TrainingAttnProcessor",
    "cogview4_training_packed": r"CogView4TrainingAttnProcessor",
    "glm_image_mask": _OF_QUERIES,
}
"""Cases, or layouts of one, that are refused in words, and what these say."""
