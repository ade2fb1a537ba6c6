"""What a case of the zoo is, and the helpers that its families share.

A case is a tiny configuration of a real diffusers model class with random weights, plus inputs for
every layout of padding that the model accepts. Whatever hides attention from the output at
initialisation (zero gates, zero projections) is filled, so a wrong attention call shows.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

Layout = Literal["none", "all_true", "right", "left", "ragged", "gap"]
Inputs = dict[str, Any]

UNMASKED: tuple[Layout, ...] = ("none",)
RIGHT_ONLY: tuple[Layout, ...] = ("all_true", "right", "ragged")
ANY_MASK: tuple[Layout, ...] = ("none", "all_true", "right", "left", "ragged", "gap")

BATCH = 2
TEXT = 12  # padded length of the text


@dataclass(frozen=True)
class Refusal:
    """Layers that are left to their default attention, for a mathematical reason, and counted.

    Attributes:
        layer: regular expression over the names of the layers concerned.
        reason: regular expression that the counted reason must match.
    """

    layer: str
    reason: str


@dataclass(frozen=True, eq=False)
class Case:
    """A tiny model and how to call it.

    Attributes:
        name: test id.
        model: diffusers model class.
        config: its constructor arguments.
        inputs: `(layout, pads) -> keyword arguments of forward`; `pads` is added to the content of
            padded tokens, which must never reach the output.
        layouts: layouts of padding the model accepts.
        prepare: changes the built model, e.g. loads an adapter.
        pick: the tensor to compare, out of what forward returns. All of it is compared: no model
            of the zoo returns rows that belong to padded tokens.
        refusal: layers that are left to the default attention, if any.
        pads: whether a caller can change the content of padded tokens at all.
        outside: how many attention calls no processor makes, but some module by itself.
        since: the diffusers release from which on the model takes these inputs, if not from the
            oldest that is supported.
        unreached: why some attention calls of the model cannot be switched, where `watch` sees
            other calls than the switched processors make; empty where all is reached.
    """

    name: str
    model: type[nn.Module]
    config: Mapping[str, Any]
    inputs: Callable[[Layout, float], Inputs]
    layouts: tuple[Layout, ...] = UNMASKED
    prepare: Callable[[nn.Module], None] | None = None
    pick: Callable[[Any], torch.Tensor] = lambda returned: returned[0]
    refusal: Refusal | None = None
    pads: bool = True
    outside: int = 0
    since: str = "0.36.0"
    unreached: str = ""

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the model in eval mode; the same weights at every call."""
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # Chroma still imports a class of diffusers under its old name.
            warnings.filterwarnings("ignore", message=".*FluxPosEmbed", category=FutureWarning)
            torch.manual_seed(0)
            model = self.model(**self.config)
            if self.prepare is not None:
                self.prepare(model)
            fill_zeros(model)
        return nn.Module.to(model.eval(), dtype)  # ModelMixin.to logs a warning, even for float32

    def run(self, model: nn.Module, layout: Layout, pads: float = 0.0) -> torch.Tensor:
        """Return the output of one forward, inputs on the device and in the dtype of the model."""
        weight = next(model.parameters())
        inputs = cast(self.inputs(layout, pads), weight.dtype, weight.device)
        with torch.no_grad():
            return self.pick(model(**inputs, return_dict=False))

    @functools.cache  # noqa: B019  # a case lives as long as the process
    def exact(self, layout: Layout) -> torch.Tensor:
        """Return the output of the default attention in float64."""
        model = self.build(torch.float64)
        with warnings.catch_warnings():
            # Some norms compute in float32 whatever the weights are.
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            return self.run(model, layout)


def fill_zeros(model: nn.Module) -> None:
    """Give parameters that start as all zeros (gates, modulations, output layers) random values."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)


def cast(inputs: Any, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """Return nested `inputs` on `device`, every floating tensor in `dtype`."""
    if isinstance(inputs, torch.Tensor):
        return inputs.to(device, dtype if inputs.is_floating_point() else None)
    if isinstance(inputs, dict):
        return {name: cast(value, dtype, device) for name, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(cast(value, dtype, device) for value in inputs)
    return inputs


def cast_input(linear: nn.Linear) -> None:
    """Let a layer take the float32 sinusoids of a time embedding, whatever its own dtype."""
    linear.register_forward_pre_hook(lambda layer, given: (given[0].to(layer.weight.dtype),))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return normal values that depend on `shape` and `seed` alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def timesteps(scale: float = 1.0) -> torch.Tensor:
    """Return a different time for every sample, shape (B,), below `scale`."""
    return torch.linspace(0.3, 0.7, BATCH) * scale


def key_mask(layout: Layout, length: int = TEXT) -> torch.Tensor | None:
    """Return the (B, length) bool mask of a layout, True for valid tokens; None for "none"."""
    if layout == "none":
        return None
    mask = torch.ones(BATCH, length, dtype=torch.bool)
    third = length // 3
    if layout == "right":
        mask[:, -third:] = False
    elif layout == "left":
        mask[:, :third] = False
    elif layout == "ragged":
        mask[0, -1:] = False
        mask[1, third:] = False
    elif layout == "gap":
        mask[:, third : 2 * third] = False
    return mask


def prompt(
    layout: Layout, width: int, pads: float = 0.0, *, length: int = TEXT, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return text states (B, length, width) and their mask; `pads` is added where it is False."""
    states = randn(BATCH, length, width, seed=seed)
    mask = key_mask(layout, length)
    if mask is not None:
        states = states + pads * (~mask).unsqueeze(-1)
    return states, mask
