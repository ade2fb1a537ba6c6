"""Layer by layer: one run on the default attention, in which every attention call is compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_fa3.kernels import KernelChoice
from diffusers_fa3.layers import coverage, disable_fa3, enable_fa3
from diffusers_fa3.tools.check.kept import modules_of
from diffusers_fa3.tools.check.observed import Observer, observed
from diffusers_fa3.tools.check.parity import Layer
from diffusers_fa3.tools.check.runs import run


def by_layer(
    pipe_or_model: Any,
    arguments: Mapping[str, Any],
    kernel: KernelChoice,
    layers: Any,
    seed: int,
    observer: Observer,
) -> tuple[tuple[Layer, ...], Any]:
    """What the observer found, by layer; and what the layers counted."""
    disable_fa3(pipe_or_model)
    enable_fa3(pipe_or_model, kernel=kernel, fallback="silent", layers=layers)
    try:
        with observed(modules_of(pipe_or_model), observer):
            run(pipe_or_model, arguments, seed, lambda: None)
        report = coverage(pipe_or_model)
    finally:
        disable_fa3(pipe_or_model)
    rows = [row for row in report.rows if row.kernel != "default" or row.unswitchable]
    found = tuple(
        Layer(
            row.name,
            row.processor,
            tuple(call for call in observer.calls if call.layer == row.name),
            tuple(raised for raised in observer.raised if raised.layer == row.name),
            row.fallbacks,
            row.unswitchable,
        )
        for row in rows
    )
    return found, report
