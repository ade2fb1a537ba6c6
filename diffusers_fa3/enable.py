"""enable_fa3, disable_fa3 and coverage: the switch, for one model or pipeline and no other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, get_args

from torch import nn

from diffusers_fa3.calls import Fallback, Settings
from diffusers_fa3.errors import InputError, UnsupportedModelError
from diffusers_fa3.processor import is_request, layer_of, unwrap, wrap
from diffusers_fa3.providers import KernelChoice, check_choice
from diffusers_fa3.report import Coverage, compiled_row, row_of

DENOISERS = ("transformer", "unet", "controlnet", "prior")
"""How the names of those components of a pipeline begin that are switched with it."""

LayerFilter = str | Callable[[str, nn.Module], bool]


def enable_fa3(
    pipe_or_model: Any,
    *,
    kernel: KernelChoice = "auto",
    fallback: Fallback = "warn",
    layers: LayerFilter | None = None,
) -> Coverage:
    """Put the attention layers of one model, or of a pipeline's denoisers, on a varlen kernel.

    Every layer keeps its own processor object, wrapped: see `FA3AttnProcessor`. Switching a model
    that is switched already gives it the new options, and begins its counts anew.

    Args:
        pipe_or_model: a diffusers model, any module with attention layers below it, or a pipeline.
            Of a pipeline, the denoisers are switched (transformer*, unet*, controlnet*, prior*),
            not the VAE nor text encoders; pass those by themselves.
        kernel: "auto", the best that is installed; or a name from `available_kernels()`, or a
            function with FlashAttention's arguments, which is used or refused.
        fallback: the default attention serves what no kernel can. Besides being counted, this is
            told: "warn" once for each processor class and reason, "error" raises instead, "silent".
        layers: which of the layers: a regular expression, searched in their names as `coverage`
            shows them; or a function of a layer's name and module. None: all.

    Returns:
        What `coverage` says now.

    Raises:
        UnsupportedModelError: there is no attention layer, or none that `layers` selects.
        KernelUnavailableError: `kernel` is not a known name, or is not installed.
        InputError: an unknown `fallback`.
        Nothing is switched in any of these cases.
    """
    if fallback not in get_args(Fallback):
        raise InputError(f"fallback is one of {get_args(Fallback)}; got {fallback!r}")
    check_choice(kernel)
    settings = Settings(kernel, fallback)
    found = dict(_layers(pipe_or_model))
    selected = {name: layer for name, layer in found.items() if _selects(layers, name, layer)}
    if not selected:
        raise UnsupportedModelError(
            f"layers={layers!r} selects none of the {len(found)} attention layers: "
            f"{', '.join(list(found)[:3])}, ..."
        )
    wrapped = [
        (layer, wrap(unwrap(layer.processor), settings, name)) for name, layer in selected.items()
    ]
    for layer, processor in wrapped:
        layer.processor = processor
    return coverage(pipe_or_model)


def disable_fa3(pipe_or_model: Any) -> None:
    """Give every layer the very processor object back that it had; harmless where none is switched.

    Raises:
        UnsupportedModelError: there is no attention layer.
    """
    for _, layer in _layers(pipe_or_model):
        if layer_of(layer.processor) is not None:
            layer.processor = unwrap(layer.processor)


def coverage(pipe_or_model: Any) -> Coverage:
    """What each attention layer did since it was switched.

    Raises:
        UnsupportedModelError: there is no attention layer.
    """
    named = [(name, layer.processor) for name, layer in _layers(pipe_or_model)]
    records = [(name, processor, layer_of(processor)) for name, processor in named]
    owners = dict.fromkeys(record.settings.owner for *_, record in records if record is not None)
    compiled = [row for row in map(compiled_row, owners) if row is not None]
    return Coverage(
        (*(row_of(*record) for record in records), *compiled),
        sum(record.plans_made for *_, record in records if record is not None),
        sum(record.plans_reused for *_, record in records if record is not None),
    )


def _layers(pipe_or_model: Any) -> Iterator[tuple[str, Any]]:
    """(name, module) of all attention layers; known by a `processor` that can be called."""
    found = [
        (f"{prefix}{name}", module)
        for prefix, model in models_of(pipe_or_model)
        for name, module in model.named_modules()
        if callable(getattr(module, "processor", None)) and not is_request(module.processor)
    ]
    if not found:
        raise UnsupportedModelError(
            f"{type(pipe_or_model).__name__} has no attention layer to switch: none of its modules "
            "has a processor. Pass a diffusers model, or a pipeline with a transformer or unet"
        )
    yield from found


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
        (f"{name}.", model)
        for name, component in components.items()
        if name.startswith(DENOISERS)
        for model in _modules_of(component)
    ]


def _modules_of(component: Any) -> list[nn.Module]:
    """A component may be a list, as several controlnets are."""
    members = component if isinstance(component, list | tuple) else [component]
    return [member for member in members if isinstance(member, nn.Module)]


def _selects(layers: LayerFilter | None, name: str, layer: nn.Module) -> bool:
    if layers is None:
        return True
    if isinstance(layers, str):
        return re.search(layers, name) is not None
    return layers(name, layer)
