"""The whole model or pipeline, once on its default attention and once on ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
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


def draw(
    pipe_or_model: Any,
    arguments: Mapping[str, Any],
    *,
    kernel: Any,
    layers: Any,
    seed: int,
    on_step: Callable[[str], None],
) -> tuple[Drawn, Any, Pictures | None]:
    """Run three times: on the default, on ours, and on another of the default's backends.

    Returns:
        What differs, the coverage of the run on ours, and the pictures if there are any.
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

    steps = tuple(
        _difference(*three)
        for three in zip_longest(
            default.latents, ours.latents, () if other is None else other.latents
        )
    )
    result = _difference(default.result, ours.result, None if other is None else other.result)
    if result is None and not raised:
        notes.append("the result is not compared: it is no tensor, and no picture")
    if not default.latents and not isinstance(pipe_or_model, torch.nn.Module):
        notes.append("the pipeline does not hand out its latents by step")
    drawn = Drawn(tuple(filter(None, steps)), result, "; ".join(notes), raised)
    return drawn, report, _pictures(default.result, ours.result)


@contextmanager
def other_backend() -> Iterator[None]:
    """PyTorch's attention on another of its backends, which is as right as the usual one."""
    # Efficient attention does not lay out the logits; where it cannot serve, math does.
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield


def _difference(
    default: Array | None, ours: Array | None, other: Array | None
) -> Difference | None:
    if default is None or ours is None:
        return None
    return Difference(_apart(default, ours), None if other is None else _apart(default, other))


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


def _pictures(default: Array | None, ours: Array | None) -> Pictures | None:
    if default is None or ours is None or default.shape != ours.shape:
        return None
    coloured = default.ndim in (4, 5) and default.shape[-1] in (1, 3)
    return Pictures(default, ours) if coloured else None
