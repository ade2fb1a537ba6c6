"""Find the attention layers of a model, or of the denoisers of a pipeline."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from diffusers import ModelMixin
from torch import nn

from diffusers_fa3.errors import UnsupportedModelError
from diffusers_fa3.layers.processor import is_request
from diffusers_fa3.parallel import Home

DENOISERS = re.compile(r"(^|_)(transformer|unet|controlnet|prior|super_res)|^decoder")
"""The names of those components of a pipeline that are switched with it, in all of diffusers."""


def attention_layers(pipe_or_model: Any) -> Iterator[tuple[str, Any]]:
    """(name, module) of all attention layers; known by a `processor` that can be called.

    The processor is the module's own. Wrappers, as `torch.compile` makes them, hand on the
    attributes of the module below, which is found by itself.
    """
    found = [
        (f"{prefix}{name}", module)
        for prefix, model in models_of(pipe_or_model)
        for name, module in model.named_modules()
        if ("processor" in vars(module) or "processor" in module._modules)
        and callable(module.processor)
        and not is_request(module.processor)
    ]
    if not found:
        raise UnsupportedModelError(
            f"{type(pipe_or_model).__name__} has no attention layer to switch: none of its modules "
            "has a processor. Pass a diffusers model, or a pipeline with a transformer or unet"
        )
    yield from found


def homes_of(pipe_or_model: Any) -> dict[int, Home]:
    """Where the modules of diffusers' models live: the innermost model, by the module's id."""
    return {
        id(module): Home(model, name)
        for _, outer in models_of(pipe_or_model)
        for model in outer.modules()  # from the outermost in
        if isinstance(model, ModelMixin)
        for name, module in model.named_modules()
        if "processor" in vars(module) or "processor" in module._modules
    }


def models_of(pipe_or_model: Any) -> list[tuple[str, nn.Module]]:
    """The models that are switched, each with the prefix of its layers' names."""
    if isinstance(pipe_or_model, nn.Module):
        return [("", pipe_or_model)]
    components = getattr(pipe_or_model, "components", None)
    if not isinstance(components, dict):
        raise UnsupportedModelError(
            "enable_fa3, disable_fa3 and coverage take a torch.nn.Module or a diffusers pipeline; "
            f"got {type(pipe_or_model).__name__}"
        )
    return [
        (f"{prefix}.", model)
        for name, component in components.items()
        if DENOISERS.search(name)
        for prefix, model in _modules_of(name, component)
    ]


def _modules_of(name: str, component: Any) -> list[tuple[str, nn.Module]]:
    """A component may be a list, as several controlnets are; each member has a name of its own."""
    members = {name: component}
    if isinstance(component, list | tuple):
        members = {f"{name}.{i}": member for i, member in enumerate(component)}
    return [(name, member) for name, member in members.items() if isinstance(member, nn.Module)]
