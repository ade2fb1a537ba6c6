"""enable_fa3, disable_fa3 and coverage: the switch, for one model or pipeline and no other."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffusers_fa3.errors import FallbackWarning, InputError, UnsupportedModelError
from diffusers_fa3.kernels import KernelChoice
from diffusers_fa3.layers.block_masks import lay_out_masks_of, spread_masks_of
from diffusers_fa3.layers.coverage_report import (
    Coverage,
    Row,
    compiled_row,
    row_of,
    row_of_unswitched,
)
from diffusers_fa3.layers.find import attention_layers, homes_of, models_of
from diffusers_fa3.layers.pads import layers_that_pack_queries
from diffusers_fa3.layers.processor import record_of, unwrap, wrap
from diffusers_fa3.layers.record import Fallback, Settings, warnings_are_wanted
from diffusers_fa3.parallel import APPLIED

LayerFilter = str | Callable[[str, nn.Module], bool]

SWITCHED = "_fa3_switched"
"""Attribute of a layer that was switched: diffusers may give it another processor at any time. It
is True, or the `Refusal` of a layer that stayed as it was."""


@dataclass(frozen=True)
class Refusal:
    """Why a layer could not be switched; it holds as long as the layer has this processor."""

    processor: Any
    reason: str


def enable_fa3(
    pipe_or_model: Any,
    *,
    kernel: KernelChoice | None = None,
    fallback: Fallback | None = None,
    layers: LayerFilter | None = None,
    pack_queries: bool = False,
) -> Coverage:
    """Put the attention layers of one model, or of a pipeline's denoisers, on a varlen kernel.

    Every layer keeps its own processor object, wrapped: see `FA3AttnProcessor`. A model that is
    switched already gets the new options, and its counts begin anew.

    A layer that `set_attention_backend` sets to a backend of diffusers, before or after the switch,
    uses that backend until `reset_attention_backend`; its calls are counted. Processors without a
    backend setting stay on the kernel. So do all layers under `attention_backend(...)`, which sets
    the backend of the process.

    A layer whose processor cannot be wrapped, such as a function, stays on the default attention.
    `coverage` gives the reason; the layer's calls cannot be counted.

    Args:
        pipe_or_model: a diffusers model, any module with attention layers below it, or a pipeline.
            Of a pipeline, the denoisers are switched: the components with transformer, unet,
            controlnet, prior or super_res in their name, and those that begin with decoder. The VAE
            and the text encoders are not; pass them by themselves.
        kernel: "auto", the best that is installed; "fastest", which times the kernels that "auto"
            may take and the default attention on the first call of each kind; or a name from
            `available_kernels()`, or a function with FlashAttention's arguments, which is used or
            refused. None: the environment variable `DIFFUSERS_FA3_KERNEL`, or else "auto".
        fallback: how a call is told that no kernel can serve and that the default attention serves
            instead. Every such call is counted. "warn" also warns once for each processor class and
            reason, "error" raises instead of serving, "silent" does neither. A layer that cannot be
            switched is told at once: "warn" warns once for each reason, "error" raises. None: the
            environment variable `DIFFUSERS_FA3_FALLBACK`, or else "warn". Where the verbosity of
            `diffusers.utils.logging` is below that of warnings, "warn" does not warn.
        layers: which of the layers: a regular expression, searched in their names as `coverage`
            shows them; or a function of a layer's name and module. None: all.
        pack_queries: leave padded tokens out as queries, too, and not as keys alone. This is for
            models that never read the output of attention at padded tokens: the model's output
            stays the same, and only the hidden states at padded tokens differ.
            `diffusers_fa3.layers.pads` lists these models and their layers. Other layers of these
            models, and compiled graphs, pack keys alone.

    Returns:
        What `coverage` says now.

    Raises:
        UnsupportedModelError: there is no attention layer, or none that `layers` selects, or none
            of those can be switched; with fallback="error", one of them cannot be; or
            `pack_queries` for a model that is not known to leave padded tokens unread.
        KernelUnavailableError: `kernel` is not a known name, or is not installed.
        InputError: an unknown `fallback`, or `layers` that is none of these.
        Nothing is switched in any of these cases.

    Example:
        >>> import torch
        >>> from diffusers.models.attention_processor import Attention
        >>> from diffusers_fa3 import coverage, disable_fa3, enable_fa3
        >>> block = torch.nn.ModuleDict({"attn": Attention(query_dim=8, heads=2, dim_head=4)})
        >>> report = enable_fa3(block, kernel="reference")
        >>> _ = block["attn"](torch.randn(1, 5, 8))
        >>> print(coverage(block))
        layers      processor         kernel     calls
        attn    x1  AttnProcessor2_0  reference  dense 1
        1 calls on a kernel, 0 on the default attention; 0 plans made, 0 reused
        >>> disable_fa3(block)
    """
    settings = Settings.asked(kernel, fallback)
    _check_filter(layers)
    found = dict(attention_layers(pipe_or_model))
    selected = {name: layer for name, layer in found.items() if _selects(layers, name, layer)}
    if not selected:
        raise UnsupportedModelError(
            f"layers={layers!r} selects none of the {len(found)} attention layers: "
            f"{', '.join(list(found)[:3])}, ..."
        )
    packing = _layers_that_pack_queries(pipe_or_model) if pack_queries else frozenset()
    components = [prefix for prefix, _ in models_of(pipe_or_model)]
    homes = homes_of(pipe_or_model)
    wrapped: dict[str, Any] = {}
    refusals: dict[str, Refusal] = {}
    for name, layer in selected.items():
        component = next(prefix for prefix in components if name.startswith(prefix))
        try:
            wrapped[name] = wrap(
                unwrap(layer.processor),
                settings,
                name,
                name in packing,
                component,
                homes.get(id(layer)),
            )
        except UnsupportedModelError as error:
            refusals[name] = Refusal(layer.processor, str(error))
    if refusals:
        _tell(refusals, len(selected), settings)
    for name, processor in wrapped.items():
        selected[name].processor = processor
        mark_switched(selected[name])
    for name, refusal in refusals.items():
        setattr(selected[name], SWITCHED, refusal)
    _for_every_module(pipe_or_model, spread_masks_of)
    return coverage(pipe_or_model)


def disable_fa3(pipe_or_model: Any) -> None:
    """Give every layer the very processor object back that it had; harmless where none is switched.

    Raises:
        UnsupportedModelError: there is no attention layer.

    Example:
        >>> from diffusers.models.attention_processor import Attention
        >>> from diffusers_fa3 import disable_fa3, enable_fa3
        >>> layer = Attention(query_dim=8, heads=2, dim_head=4)
        >>> before = layer.processor
        >>> report = enable_fa3(layer)
        >>> disable_fa3(layer)
        >>> layer.processor is before
        True
    """
    for _, layer in attention_layers(pipe_or_model):
        if record_of(layer.processor) is not None:
            layer.processor = unwrap(layer.processor)
        vars(layer).pop(SWITCHED, None)
    _for_every_module(pipe_or_model, lay_out_masks_of)
    _for_every_module(pipe_or_model, _forget_plan)
    _for_every_module(pipe_or_model, _unwrap_kept_processors)


def coverage(pipe_or_model: Any) -> Coverage:
    """What each attention layer did since it was switched.

    Much in diffusers gives layers new processors: loading an IP-Adapter, fusing projections,
    `set_attn_processor`. The row of such a layer says `replaced`; `enable_fa3` switches it again.

    Raises:
        UnsupportedModelError: there is no attention layer.

    Example:
        >>> import torch
        >>> from diffusers.models.attention_processor import Attention
        >>> from diffusers_fa3 import coverage, enable_fa3
        >>> layer = Attention(query_dim=8, heads=2, dim_head=4)
        >>> report = enable_fa3(layer, kernel="reference", fallback="silent")
        >>> bias = torch.rand(1, 5, 5)  # for every query and key: no kernel takes it
        >>> _ = layer(torch.randn(1, 5, 8), attention_mask=bias)
        >>> coverage(layer).rows[0].fallbacks
        {'float32 mask with values that are a bias, not a mask': 1}
    """
    layers = list(attention_layers(pipe_or_model))
    rows = [_row(name, layer) for name, layer in layers]
    records = [record for _, layer in layers if (record := record_of(layer.processor)) is not None]
    switches = dict.fromkeys(record.settings.switch_id for record in records)
    compiled = [row for row in map(compiled_row, switches) if row is not None]
    return Coverage(
        (*rows, *compiled),
        sum(record.plans_made for record in records),
        sum(record.plans_reused for record in records),
    )


def _layers_that_pack_queries(pipe_or_model: Any) -> frozenset[str]:
    return frozenset(
        f"{prefix}{name}"
        for prefix, model in models_of(pipe_or_model)
        for name in layers_that_pack_queries(model)
    )


def _row(name: str, layer: Any) -> Row:
    record = record_of(layer.processor)
    if record is not None:
        return row_of(name, record)
    switched = vars(layer).get(SWITCHED)
    if isinstance(switched, Refusal) and switched.processor is layer.processor:
        return row_of_unswitched(name, layer.processor, False, switched.reason)
    return row_of_unswitched(name, layer.processor, switched is not None, "")


def _tell(refusals: Mapping[str, Refusal], selected: int, settings: Settings) -> None:
    """Raise if layers that cannot be switched are an error, else warn as the user asked."""
    layers_of: dict[str, list[str]] = {}
    for name, refusal in refusals.items():
        layers_of.setdefault(refusal.reason, []).append(name)
    told = {_some(names): reason for reason, names in layers_of.items()}
    if len(refusals) == selected or settings.fallback == "error":
        raise UnsupportedModelError(
            f"{len(refusals)} of {selected} attention layers cannot be switched. "
            f"{'. '.join(f'{names}: {reason}' for names, reason in told.items())}. Select others "
            "by `layers`: a regular expression, searched in their names, or a function of the name "
            "and the module of a layer"
        )
    if settings.fallback == "warn" and warnings_are_wanted():
        for names, reason in told.items():
            text = f"{names}: the default attention serves, and is not counted: {reason}"
            warnings.warn(text, FallbackWarning, stacklevel=3)


def _some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - 3} more" if names[3:] else ""
    return ", ".join(names[:3]) + more


def leave(layer: Any, reason: str, settings: Settings) -> None:
    """Leave one layer, whose name is unknown, on the default attention; tell it as the user asked.

    Raises:
        UnsupportedModelError: with fallback="error".
    """
    refusal = Refusal(layer.processor, reason)
    # One of two: its neighbours may be switched, so only fallback="error" raises.
    _tell({type(layer).__name__: refusal}, 2, settings)
    setattr(layer, SWITCHED, refusal)


def _unwrap_kept_processors(module: nn.Module) -> None:
    """Models with fused projections keep the processors that unfusing gives back."""
    kept = vars(module).get("original_attn_processors")
    if isinstance(kept, dict):
        vars(module)["original_attn_processors"] = {n: unwrap(p) for n, p in kept.items()}


def _forget_plan(module: nn.Module) -> None:
    vars(module).pop(APPLIED, None)


def mark_switched(layer: nn.Module) -> None:
    """Note on a layer that it was switched, whatever processors it may get from now on."""
    setattr(layer, SWITCHED, True)


def _for_every_module(pipe_or_model: Any, do: Callable[[nn.Module], None]) -> None:
    for _, model in models_of(pipe_or_model):
        for module in model.modules():
            do(module)


def _check_filter(layers: LayerFilter | None) -> None:
    rule = "layers is a regular expression, or a function of a layer's name and module"
    if isinstance(layers, str):
        try:
            re.compile(layers)
        except re.error as error:
            raise InputError(
                f"{rule}; got {layers!r}: {error}. Escape what is no pattern by re.escape"
            ) from error
    elif layers is not None and not callable(layers):
        raise InputError(
            f"{rule}; got {type(layers).__name__}. Of names, make one: "
            "'|'.join(map(re.escape, names))"
        )


def _selects(layers: LayerFilter | None, name: str, layer: nn.Module) -> bool:
    if layers is None:
        return True
    if isinstance(layers, str):
        return re.search(layers, name) is not None
    return layers(name, layer)
