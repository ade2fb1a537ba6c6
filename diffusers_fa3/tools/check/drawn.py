"""The whole model or pipeline, once on its default attention and once on ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_fa3.layers import coverage, disable_fa3, enable_fa3
from diffusers_fa3.tools.check.budget import Errors
from diffusers_fa3.tools.check.parity import Difference, Drawn
from diffusers_fa3.tools.check.runs import Run, must_run, run

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Pictures:
    """The results of both runs: pictures (B, H, W, 3) or videos (B, F, H, W, 3), from 0 to 1."""

    default: Array
    ours: Array


@dataclass(frozen=True)
class Runs:
    """Three runs on one process, from the same noise."""

    default: Run
    ours: Run
    """Empty if the kernel raised."""
    other: Run | None
    """The default on another of its backends; None if it fails there."""
    raised: str
    """The error with which the run on ours ended."""
    notes: tuple[str, ...]
    """What could not be compared, and why."""


def draw(
    pipe_or_model: Any,
    arguments: Mapping[str, Any],
    *,
    kernel: Any,
    layers: Any,
    seed: int,
    on_step: Callable[[str], None],
) -> tuple[Runs, Any]:
    """Run three times: on the default, on ours, and on another of the default's backends.

    Returns:
        The runs, and the coverage of that on ours.
    """

    def go(name: str) -> Run:
        return run(pipe_or_model, arguments, seed, lambda: on_step(name))

    with must_run():
        default = go("default")
    ours, other, raised = Run((), None), None, ""
    notes: list[str] = []
    enable_fa3(pipe_or_model, kernel=kernel, fallback="silent", layers=layers)
    try:
        ours = go("ours")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a kernel may raise any; the check tells
        raised = f"{type(error).__name__}: {error}"
    finally:
        report = coverage(pipe_or_model)
        disable_fa3(pipe_or_model)
    try:
        with other_backend():
            other = go("default, another backend")
    except Exception as error:  # a model may rely on one backend's layout; this run is an extra
        notes.append(f"the default fails on another backend: {type(error).__name__}: {error}")
    if (default.result is None or ours.result is None) and not raised:
        notes.append("the result is not compared: it is no tensor, and no picture")
    if not default.latents and not isinstance(pipe_or_model, torch.nn.Module):
        notes.append("the pipeline does not hand out its latents by step")
    return Runs(default, ours, other, raised, tuple(notes)), report


def drawn_of(runs: Runs, on_ranks: Run | None = None, rounding: float = 0.0) -> Drawn:
    """What differs between the runs on one process, and that of ours on ranks if there is one."""

    def difference(of: Callable[[Run], Array | None]) -> Difference | None:
        default, ours = of(runs.default), of(runs.ours)
        if default is None or ours is None:
            return None
        extra = (None if run is None else of(run) for run in (runs.other, on_ranks))
        others = (None if found is None else _apart(default, found) for found in extra)
        return Difference(_apart(default, ours), *others)

    many = max(len(run.latents) for run in (runs.default, runs.ours))
    steps = tuple(difference(partial(_latents, step=step)) for step in range(many))
    return Drawn(
        tuple(filter(None, steps)),
        difference(lambda run: run.result),
        "; ".join(runs.notes),
        runs.raised,
        rounding,
    )


def _latents(run: Run, step: int) -> Array | None:
    return run.latents[step] if step < len(run.latents) else None


@contextmanager
def other_backend() -> Iterator[None]:
    """PyTorch's attention on another of its backends, which is as right as the usual one."""
    # Efficient attention does not lay out the logits; where it cannot serve, math does.
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield


def _apart(default: Array, found: Array) -> Errors:
    """How far two arrays are apart, where the default is finite, relative to its largest value."""
    if default.shape != found.shape:
        return Errors(np.inf, np.inf)
    known = np.isfinite(default)
    if not known.any():
        return Errors(0.0, 0.0)
    right = default[known].astype(np.float64)
    error = np.abs(found[known].astype(np.float64) - right)
    unit = float(np.abs(right).max()) or 1.0
    return Errors(float(error.max()) / unit, float(np.sqrt(np.square(error).mean())) / unit)


def pictures_of(default: Array | None, ours: Array | None) -> Pictures | None:
    """The results of two runs, if they are pictures or videos."""
    if default is None or ours is None or default.shape != ours.shape:
        return None
    coloured = default.ndim in (4, 5) and default.shape[-1] in (1, 3)
    return Pictures(default, ours) if coloured else None
