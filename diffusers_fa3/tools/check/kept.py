"""A model or pipeline is given back as it was: processors, hooks, modes and settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

ATTRIBUTES = ("processor", "original_attn_processors", "training")


def components_of(pipe_or_model: Any) -> dict[str, Any]:
    """The components of a pipeline by name; a model is its own."""
    if isinstance(pipe_or_model, nn.Module):
        return {"": pipe_or_model}
    components = getattr(pipe_or_model, "components", None)
    return dict(components) if isinstance(components, dict) else {}


def modules_of(pipe_or_model: Any) -> list[nn.Module]:
    """All modules of a model, or of all components of a pipeline, each once."""
    components = components_of(pipe_or_model).values()
    members = [m for c in components for m in (c if isinstance(c, list | tuple) else [c])]
    found = [m for root in members if isinstance(root, nn.Module) for m in root.modules()]
    return list(dict.fromkeys(found))


@contextmanager
def kept(pipe_or_model: Any) -> Iterator[None]:
    """Put back, in the end, all that a check changes; PyTorch's random state, too.

    Models are in eval mode within. What a switch keeps on modules has names that begin with _fa3.
    """
    modules = modules_of(pipe_or_model)
    saved = [_state(module) for module in modules]
    plain = [] if isinstance(pipe_or_model, nn.Module) else [pipe_or_model]
    plain += [c for name, c in components_of(pipe_or_model).items() if "scheduler" in name]
    attributes = [(thing, dict(vars(thing))) for thing in plain if hasattr(thing, "__dict__")]
    try:
        with torch.random.fork_rng(gpus_of(pipe_or_model)):
            for module in modules:
                module.training = False
            yield
    finally:
        for module, (own, processor, hooks) in zip(modules, saved):
            _put_back(module, own, processor, hooks)
        for thing, own in attributes:
            vars(thing).clear()
            vars(thing).update(own)


def device_of(pipe_or_model: Any) -> torch.device:
    """Where it runs: where its weights are, unless it is offloaded."""
    runs_on = getattr(pipe_or_model, "_execution_device", None)
    if isinstance(runs_on, torch.device):
        return runs_on
    weights = (weight for module in modules_of(pipe_or_model) for weight in module.parameters())
    return next((weight.device for weight in weights), torch.device("cpu"))


def gpus_of(pipe_or_model: Any) -> list[int]:
    """The numbers of the GPUs that it uses."""
    modules = modules_of(pipe_or_model)
    used = {weight.device for module in modules for weight in module.parameters(recurse=False)}
    gpus = [device for device in {*used, device_of(pipe_or_model)} if device.type == "cuda"]
    return sorted({torch.cuda.current_device() if d.index is None else d.index for d in gpus})


_State = tuple[dict[str, Any], Any, dict[int, Any]]
"""Attributes, a processor that is a module itself, and pre-hooks."""


def _state(module: nn.Module) -> _State:
    own = {name: value for name, value in vars(module).items() if _changes(name)}
    return own, module._modules.get("processor"), dict(module._forward_pre_hooks)


def _changes(name: str) -> bool:
    return name in ATTRIBUTES or name.startswith("_fa3")


def _put_back(
    module: nn.Module, own: dict[str, Any], processor: Any, hooks: dict[int, Any]
) -> None:
    attributes = vars(module)
    for name in [name for name in attributes if _changes(name) and name not in own]:
        del attributes[name]
    attributes.update(own)
    if processor is not None:
        module._modules["processor"] = processor
    now = module._forward_pre_hooks
    # Only those of a switch, which the check took away: models add and remove hooks of their own.
    ours = {key: hook for key, hook in hooks.items() if _is_ours(hook)}
    if ours.keys() - now.keys():
        in_order = {key: hook for key, hook in hooks.items() if key in now or key in ours} | now
        now.clear()
        now.update(in_order)
        module._forward_pre_hooks_with_kwargs.update(dict.fromkeys(ours, True))


def _is_ours(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("diffusers_fa3.")
