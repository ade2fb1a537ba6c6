"""The plans of models that draw pictures."""

from __future__ import annotations

from typing import Any

from diffusers_fa3.parallel.model_plan import CPPlan, ModelPlan, gather_output, split_input


def _sd3(model: Any) -> CPPlan:
    tokens = {"hidden_states": split_input(1, 3), "encoder_hidden_states": split_input(1, 3)}
    return {"transformer_blocks.0": tokens, "proj_out": gather_output()}


IMAGE: dict[str, ModelPlan] = {
    "SD3Transformer2DModel": ModelPlan(_sd3, split=r"transformer_blocks\.\d+\.attn2?"),
}

IMAGE_WHY_NOT: dict[str, str] = {}
"""Why a class can have no plan."""
