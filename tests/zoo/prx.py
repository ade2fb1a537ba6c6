"""PRX: image queries attend to [text, pads, image] keys, so Sq differs from Sk."""

from __future__ import annotations

from diffusers.models.transformers.transformer_prx import PRXTransformer2DModel

from .case import ANY_MASK, BATCH, Case, Inputs, Layout, prompt, randn, timesteps


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, 32, pads)
    return {
        "hidden_states": randn(BATCH, 4, 8, 8),
        "encoder_hidden_states": text,
        "timestep": timesteps(),
        "attention_mask": mask,
    }


CASES = (
    Case(
        name="prx",
        model=PRXTransformer2DModel,
        config={
            "in_channels": 4,
            "patch_size": 2,
            "context_in_dim": 32,
            "hidden_size": 128,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [32, 32],
        },
        inputs=_inputs,
        layouts=ANY_MASK,
    ),
)
