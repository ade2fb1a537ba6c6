"""Modular pipelines: their components are set one by one, after the blocks were chosen."""

from __future__ import annotations

from diffusers import ComponentsManager
from diffusers.modular_pipelines import QwenImageAutoBlocks, QwenImageModularPipeline
from zoo.case import Inputs

from .case import PipelineCase
from .qwenimage import MASKED, ROUTES, components, inputs


def empty(manager: ComponentsManager | None = None) -> QwenImageModularPipeline:
    """The pipeline before any of its components was loaded."""
    return QwenImageAutoBlocks().init_pipeline(components_manager=manager)


def _pipeline() -> QwenImageModularPipeline:
    pipe = empty()
    pipe.update_components(**components())
    return pipe


def _inputs() -> Inputs:
    """Guidance is the guider's matter here; it wants a negative prompt for each prompt."""
    asked = {**inputs(), "negative_prompt": ["blurry and dark", "red"]}
    del asked["true_cfg_scale"]
    return asked


CASES = (
    PipelineCase(
        name="qwenimage_modular",
        make=_pipeline,
        inputs=_inputs,
        routes=ROUTES,
        masked=MASKED,
        latents=(("output", "latents"),),
        images=(("output_type", "pt"), ("output", "images")),
    ),
)
