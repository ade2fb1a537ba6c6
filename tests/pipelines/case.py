"""What a case is: a pipeline with everything in it, and what it is asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from zoo.case import Inputs, cast, fill_zeros


@dataclass(frozen=True, eq=False)
class PipelineCase:
    """A pipeline of tiny random components and the arguments of one call, of two steps.

    Attributes:
        name: test id.
        make: assembles the pipeline, as the documentation of diffusers does.
        inputs: the arguments of the call. The noise is among them: drawn by the pipeline, it would
            be another one in float64.
        denoisers: names of the components whose attention is to be switched.
        routes: the routes that the attention calls take.
        fallback: regular expression for the reason why the default attention serves some calls;
            empty where it serves none.
        masked: whether a prompt is padded, and the padding hidden from attention.
        latents, images: the arguments that make the pipeline return one or the other.
    """

    name: str
    make: Callable[[], Any]
    inputs: Callable[[], Inputs]
    denoisers: tuple[str, ...] = ("transformer",)
    routes: frozenset[str] = frozenset({"dense"})
    fallback: str = ""
    masked: bool = False
    latents: tuple[tuple[str, Any], ...] = (("output_type", "latent"), ("return_dict", False))
    images: tuple[tuple[str, Any], ...] = (("output_type", "pt"), ("return_dict", False))

    def build(self, dtype: torch.dtype = torch.float32) -> Any:
        """Return the pipeline, ready for use; the same weights at every call."""
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # Chroma still imports a class of diffusers under its old name.
            warnings.filterwarnings("ignore", message=".*FluxPosEmbed", category=FutureWarning)
            torch.manual_seed(0)
            pipe = self.make()
            for name in self.denoisers:
                fill_zeros(pipe.components[name])
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                nn.Module.to(component.eval(), dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def run(self, pipe: Any) -> torch.Tensor:
        """Return the latents after the last step."""
        return self._call(pipe, self.latents)

    def draw(self, pipe: Any) -> torch.Tensor:
        """Return the pictures."""
        return self._call(pipe, self.images)

    def _call(self, pipe: Any, wanted: tuple[tuple[str, Any], ...]) -> torch.Tensor:
        dtype = pipe.components[self.denoisers[0]].dtype
        returned = pipe(**cast(self.inputs(), dtype), **dict(wanted))
        return returned if isinstance(returned, torch.Tensor) else returned[0]
