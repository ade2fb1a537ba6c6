"""Plot the errors of layers against their budget, and the difference after each step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffusers_fa3.tools.check.budget import Errors
from diffusers_fa3.tools.check.parity import Call, Difference, Parity

DEFAULT, OURS, ON_RANKS = "#0072B2", "#D55E00", "#009E73"
ALLOWED, FAILED = "#555555", "#CC0000"
SMALLEST = 1e-12
"""What is drawn for an error of 0, which a logarithmic axis does not have."""


def figure_of(parity: Parity) -> Figure:
    """A panel for the layers, in the order in which the model lists them, and one for the steps."""
    panels = 1 + bool(parity.drawn.steps)
    figure = Figure(figsize=(10, 3.6 * panels), layout="constrained")
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    worst = [layer.worst for layer in parity.layers if layer.worst is not None]
    if worst:
        _layers(axes[0], worst)
    else:
        axes[0].set_title("no attention call was compared")
    if panels > 1:
        _steps(axes[1], parity.drawn.steps)
    return figure


def _layers(axes: Axes, calls: Sequence[Call]) -> None:
    places = range(len(calls))
    lines = {
        "allowed": (ALLOWED, "--", [call.measured.allowed for call in calls]),
        "default": (DEFAULT, "-", [call.measured.default for call in calls]),
        "ours": (OURS, "-", [call.measured.ours for call in calls]),
    }
    for name, (colour, style, errors) in lines.items():
        values = [_drawn(error) for error in errors]
        width = 4 if name == "default" else 1.5  # so that it is seen where ours is the same
        axes.plot(places, values, style, color=colour, label=name, marker="o", linewidth=width)
    failed = [i for i in places if not calls[i].passed]
    if failed:
        values = [_drawn(calls[i].measured.ours) for i in failed]
        axes.plot(failed, values, "x", color=FAILED, markersize=9, label="failed")
    axes.set_yscale("log")
    axes.set_title("each layer's call that uses most of its budget", fontsize="medium")
    axes.set_ylabel("largest error against float64\n(1 = largest value)")
    every = max(1, -(-len(calls) // 40))
    names = [call.layer for call in calls][::every]
    axes.set_xticks(list(places)[::every], names, rotation=30, ha="right", fontsize="x-small")
    axes.legend(frameon=False, ncols=4, fontsize="small")


def _steps(axes: Axes, steps: Sequence[Difference]) -> None:
    places = range(1, len(steps) + 1)
    lines = {"ours": (OURS, [step.ours for step in steps])}
    others = [step.other for step in steps if step.other is not None]
    if len(others) == len(steps):
        lines["default on another backend"] = (DEFAULT, others)
    on_ranks = [step.on_ranks for step in steps if step.on_ranks is not None]
    if on_ranks:
        lines["ours on ranks"] = (ON_RANKS, on_ranks)
    for name, (colour, errors) in lines.items():
        values = [_drawn(error, "typical") for error in errors]
        axes.plot(places, values, color=colour, label=name, marker="o", markersize=4)
    axes.set_yscale("log")
    axes.set_title("latents: difference from the default", fontsize="medium")
    axes.set_ylabel("typical difference\n(1 = largest value)")
    axes.set_xlabel("step")
    axes.set_xticks(list(places))
    axes.legend(frameon=False, fontsize="small")


def _drawn(errors: Errors, kind: str = "largest") -> float:
    value = float(getattr(errors, kind))
    return max(value, SMALLEST) if math.isfinite(value) else 1.0
