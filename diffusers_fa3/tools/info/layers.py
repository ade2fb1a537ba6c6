"""What can be read of attention layers without running them: head sizes, calls, masks."""

from __future__ import annotations

import dis
import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from types import CodeType, FunctionType
from typing import Any

from torch import nn

CALLS = ("dispatch_attention_fn", "scaled_dot_product_attention", "get_attention_scores")
"""The functions by which processors ask for attention. The first is diffusers' dispatcher, which
`set_attention_backend` reaches."""

HEADS = ("heads", "num_heads", "n_heads", "num_attention_heads")
HEAD_DIM = ("head_dim", "dim_head", "dim_heads", "attention_head_dim")
QUERIES = ("to_q", "q_proj", "wq", "to_query")
QKV = ("to_qkv", "qkv_proj", "img_qkv_proj")


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one model that differ only in their number."""

    layers: str
    """Their names, with * for numbers."""
    count: int
    layer: str
    """Class name of the layers."""
    processor: str
    """Class name of their processors."""
    heads: int | None
    head_dim: int | None
    """None: it cannot be read of the layer."""
    calls: tuple[str, ...]
    """Which of `CALLS` the processor's code names."""
    masks: tuple[str, ...]
    """The processor's mask arguments that its code reads."""
    auto: str = ""
    """What "auto" takes for it in bf16 with a mask; empty: PyTorch's attention, or unknown."""


def group_layers(layers: Iterable[tuple[str, Any]]) -> tuple[LayerGroup, ...]:
    """(name, layer) of attention layers, in groups, in the order of their first members."""
    counts = Counter(_alone(name, layer) for name, layer in layers)
    return tuple(replace(group, count=count) for group, count in counts.items())


def _alone(name: str, layer: Any) -> LayerGroup:
    """The group of one layer."""
    heads, size = head_size(layer)
    call = inspect.unwrap(type(layer.processor).__call__)
    return LayerGroup(
        layers=re.sub(r"\.\d+(?=\.|$)", ".*", name),
        count=1,
        layer=type(layer).__name__,
        processor=type(layer.processor).__name__,
        heads=heads,
        head_dim=size,
        calls=attention_calls(call),
        masks=masks_read(call),
    )


def head_size(layer: nn.Module) -> tuple[int | None, int | None]:
    """Heads and head size of a layer, from its attributes or its projections."""
    heads = _number(layer, HEADS)
    size = _number(layer, HEAD_DIM)
    if size is not None or not heads:
        return heads, size
    wide = _number(layer, ("inner_dim",))
    if wide is None:
        wide = next(filter(None, (_width(layer, name) for name in QUERIES)), None)
    if wide is None:
        of_three = next((w for name in QKV if (w := _width(layer, name))), None)
        wide = None if of_three is None or of_three % 3 else of_three // 3
    return heads, None if wide is None or wide % heads else wide // heads


def _number(layer: nn.Module, names: Iterable[str]) -> int | None:
    values = (getattr(layer, name, None) for name in names)
    return next((value for value in values if type(value) is int), None)


def _width(layer: nn.Module, name: str) -> int | None:
    width = getattr(getattr(layer, name, None), "out_features", None)
    return width if isinstance(width, int) else None


def attention_calls(function: Any) -> tuple[str, ...]:
    """Which of `CALLS` a processor's code names, itself or in functions of its module."""
    names = _names_in(function, set())
    return tuple(name for name in CALLS if name in names)


def _names_in(function: Any, seen: set[Any]) -> set[str]:
    if not isinstance(function, FunctionType) or function in seen:
        return set()
    seen.add(function)
    names = {name for code in _codes(function.__code__) for name in code.co_names}
    for name in list(names):
        helper = function.__globals__.get(name)
        if getattr(helper, "__module__", None) == function.__module__:
            names |= _names_in(helper, seen)
    return names


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def masks_read(function: Any) -> tuple[str, ...]:
    """The mask arguments of a function that its code reads; others it takes and leaves unread."""
    if not isinstance(function, FunctionType):
        return ()
    read = set()
    for code in _codes(function.__code__):
        for step in dis.get_instructions(code):
            if step.opname.startswith("LOAD_"):
                read |= {*step.argval} if isinstance(step.argval, tuple) else {step.argval}
    return tuple(name for name in mask_arguments(function) if name in read)


def mask_arguments(function: Any) -> tuple[str, ...]:
    """The arguments of a function that are masks, by their names."""
    return tuple(name for name in inspect.signature(function).parameters if "mask" in name)
