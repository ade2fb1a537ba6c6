"""Whether a call is over split tokens: read from diffusers' configuration, and from our plans.

A call that is over split tokens without anyone's word is refused: each rank would see its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from diffusers_fa3.errors import ParallelError, UnsupportedModelError
from diffusers_fa3.kernels import while_tracing
from diffusers_fa3.parallel.exchange import Axes, Group
from diffusers_fa3.parallel.home import Home, home_on_the_stack, of_number
from diffusers_fa3.parallel.model_plan import ModelPlan
from diffusers_fa3.parallel.plans import UNNAMED, Named, applied


class Split(NamedTuple):
    """A call over split tokens: over whom, and what the model's plan says of it."""

    axes: Axes
    order: tuple[str, ...] = ()
    """This and the rest: see `ModelPlan`."""
    whole_first: str = ""
    trains: bool = True


def split_of(
    home: Home | None,
    layer: Any,
    processor: Any,
    parallel_config: Any,
    told: bool,
    forward: object,
) -> Split | None:
    """How the tokens of a call are split; None if this rank has all that the call needs.

    Args:
        home: where the layer lives, if known.
        layer: the layer, if known.
        processor: the layer's own processor.
        parallel_config: what the processor passed with the call, if it did.
        told: whether the processor calls diffusers' dispatcher, which can be told.
        forward: tells forwards apart. What is known of a model is asked anew in each.

    Raises:
        ParallelError: the model is split, and nobody says whether this call is.
    """
    own = getattr(processor, "_parallel_config", None) is not None
    name = type(processor).__name__
    if not torch.compiler.is_compiling():
        home = home_on_the_stack(layer) if home is None else home
        model, named = (None, UNNAMED) if home is None else (home.model, home.named)
        return _decide(model, named, name, own, parallel_config, told, forward)
    if home is None and parallel_config is not None:
        config = _of_context(parallel_config)
        return None if config is None else Split(axes_of(config))
    number = 0 if home is None else home.number
    found = _decide_in_graph(number, name, own, parallel_config is not None, told)
    if found is None:
        return None
    *groups, uneven, order, whole_first, trains = found
    ulysses, ring, everyone = (Group(*group) for group in groups)
    return Split(Axes(ulysses, ring, everyone, uneven), order, whole_first, trains)


def _decide(
    model: Any,
    named: Named,
    processor: str,
    own: bool,
    parallel_config: Any,
    told: bool,
    forward: object,
) -> Split | None:
    config = _of_context(parallel_config)
    of_model = _of_context(getattr(model, "_parallel_config", None))
    plan = None if of_model is None else _plan_of(model, forward)
    if plan is not None:
        if named.local:
            return None
        if named.split:
            return Split(axes_of(of_model), plan.order, plan.whole_first, plan.trains)
    if config is not None:
        return Split(axes_of(config))
    if of_model is None or (told and own):
        return None  # the model is not split; or its processor says that this call is not
    raise ParallelError(
        f"context parallelism: {processor} takes no part in it: each rank would see its own tokens "
        "only. Pass cp_plan=diffusers_fa3.cp_plan(model) to enable_parallelism, and set processors "
        "before it"
    )


@while_tracing
def _decide_in_graph(
    number: int, processor: str, own: bool, passed: bool, told: bool
) -> tuple[Any, ...] | None:
    """`_decide`, of constants and to constants: the fields of `Axes`, and the rest of a `Split`."""
    model, named = of_number(number)
    if not number:
        home = home_on_the_stack(None)
        model = None if home is None else home.model
    config = getattr(model, "_parallel_config", None)
    split = _decide(model, named, processor, own, config if passed else None, told, object())
    if split is None:
        return None
    *groups, uneven = split.axes
    return (*map(tuple, groups), uneven, *split[1:])


def _plan_of(model: Any, forward: object) -> ModelPlan | None:
    """`applied`, found once per forward: an adapter that is loaded changes a model's plan."""
    plan: ModelPlan | None
    known, plan = vars(model).get(APPLIED, (None, None))
    if known is not forward:
        try:
            plan = applied(model)
        except UnsupportedModelError as error:  # split by a plan of somebody else's
            raise ParallelError(f"context parallelism: {error}") from error
        vars(model)[APPLIED] = (forward, plan)
    return plan


APPLIED = "_fa3_applied"
"""Attribute of a split model: a forward, and the plan of ours by which it was split in it."""


def axes_of(config: Any) -> Axes:
    """How diffusers' `ContextParallelConfig` splits a sequence; kept on the configuration."""
    axes: Axes
    mesh, axes = vars(config).get("_fa3_axes", (None, None))
    if mesh is config._flattened_mesh:
        return axes
    uneven = getattr(config, "ulysses_anything", False) or getattr(config, "ring_anything", False)
    meshes = (config._ulysses_mesh, config._ring_mesh, config._flattened_mesh)
    ulysses, ring, everyone = (Group.of(mesh.get_group()) for mesh in meshes)
    axes = Axes(ulysses, ring, everyone, bool(uneven))
    vars(config)["_fa3_axes"] = (config._flattened_mesh, axes)
    return axes


def _of_context(parallel_config: Any) -> Any:
    """The part on context parallelism of a model's configuration; None if there is none."""
    return getattr(parallel_config, "context_parallel_config", None)
