"""`cp_plan`: how a model is split, also where diffusers has no plan for it, or half of one."""

from __future__ import annotations

import inspect
import re
from typing import Any, NamedTuple, TypeVar

from diffusers.hooks.context_parallel import (
    _CONTEXT_PARALLEL_INPUT_HOOK_TEMPLATE,
    _CONTEXT_PARALLEL_OUTPUT_HOOK_TEMPLATE,
    _get_submodule_by_name,
)
from torch import nn

from diffusers_fa3.errors import UnsupportedModelError
from diffusers_fa3.parallel.model_plan import CPPlan, ModelPlan
from diffusers_fa3.parallel.plans_image import IMAGE, IMAGE_WHY_NOT
from diffusers_fa3.parallel.plans_video import VIDEO, VIDEO_WHY_NOT

PLANS = IMAGE | VIDEO
WHY_NOT = IMAGE_WHY_NOT | VIDEO_WHY_NOT

Entry = TypeVar("Entry")


def cp_plan(model: nn.Module) -> CPPlan:
    """The plan to split a model by, for `model.enable_parallelism(config=..., cp_plan=...)`.

    Diffusers' own plan where it is right; completed where it is not; ours where there is none. See
    `docs/several_gpus.md` for the models, and the masks that each takes.

    Raises:
        UnsupportedModelError: nobody has a plan for a model of this class; the text says why.

    Example:
        >>> from diffusers import SD3Transformer2DModel
        >>> from diffusers_fa3 import cp_plan
        >>> model = SD3Transformer2DModel(num_layers=1, num_attention_heads=2, attention_head_dim=8,
        ...     joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8)
        >>> sorted(cp_plan(model))  # the modules whose inputs or outputs are split or gathered
        ['context_embedder', 'pos_embed', 'proj_out']
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"cp_plan takes one diffusers model; got {type(model).__name__}. Of a pipeline, pass "
            "pipe.transformer or pipe.unet"
        )
    ours = _of_class(PLANS, model)
    if ours is not None:
        return _of_this_release(model, ours.make(model))
    own: CPPlan | None = getattr(model, "_cp_plan", None)
    if own is not None:
        return own
    why = _of_class(WHY_NOT, model) or "nobody wrote one"
    raise UnsupportedModelError(
        f"{type(model).__name__} has no plan by which its tokens could be split over ranks: {why}. "
        "Run it on one GPU, or pass a plan of your own as cp_plan"
    )


def applied(model: nn.Module) -> ModelPlan | None:
    """Our plan, if it is the one that diffusers splits this model by."""
    ours = _of_class(PLANS, model)
    if ours is None:
        return None
    plan = _of_this_release(model, ours.make(model))
    return ours if all(_is_applied(model, *entry) for entry in plan.items()) else None


class Named(NamedTuple):
    """Whether our plan for a model's class names a layer as local, and as split."""

    local: bool
    split: bool


UNNAMED = Named(local=False, split=False)


def named_by_ours(model: nn.Module, name: str) -> Named:
    """What our plan for this model's class says of the layer of that name."""
    ours = _of_class(PLANS, model)
    if ours is None:
        return UNNAMED
    return Named(*(bool(p and re.fullmatch(p, name)) for p in (ours.local, ours.split)))


def _of_class(table: dict[str, Entry], model: nn.Module) -> Entry | None:
    return next((table[b.__name__] for b in type(model).__mro__ if b.__name__ in table), None)


def _of_this_release(model: nn.Module, plan: CPPlan) -> CPPlan:
    """A plan without arguments that modules of an older diffusers do not have."""
    return {place: _known(_modules(model, place)[0], entry) for place, entry in plan.items()}


def _known(module: nn.Module, entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    names = inspect.signature(type(module).forward).parameters
    return {name: each for name, each in entry.items() if isinstance(name, int) or name in names}


def _modules(model: nn.Module, place: str) -> list[nn.Module]:
    found = _get_submodule_by_name(model, place)
    return found if isinstance(found, list) else [found]


def _is_applied(model: nn.Module, place: str, entry: Any) -> bool:
    """Whether diffusers' hooks at this place hold this entry of a plan."""
    wanted = entry if isinstance(entry, dict | list | tuple) else [entry]
    template = (
        _CONTEXT_PARALLEL_INPUT_HOOK_TEMPLATE
        if isinstance(entry, dict)
        else _CONTEXT_PARALLEL_OUTPUT_HOOK_TEMPLATE
    )
    for module in _modules(model, place):
        registry = getattr(module, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook(template.format(place))
        if hook is None or hook.metadata != wanted:
            return False
    return True
