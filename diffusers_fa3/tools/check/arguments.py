"""What a pipeline or model is called with: what the user gave, and what it needs besides."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from diffusers_fa3.errors import InputError
from diffusers_fa3.layers import coverage
from diffusers_fa3.tools.check.kept import components_of, device_of

PROMPTS = (
    "seven",
    "a small red wooden house by a lake, seen from far away under a cloudy evening sky",
)
"""Of different length, so that one of them is padded."""
SMALL_SIDE = 8
"""On a CPU, latents are this many high and wide, unless the user says otherwise."""
SMALL_VIDEO = 9
"""Frames of a video on a CPU: 4 n + 1 and 8 n + 1, as pipelines ask for."""


def arguments_of(
    pipe_or_model: Any, inputs: Mapping[str, Any] | None, prompts: Sequence[str] | None, steps: int
) -> dict[str, Any]:
    """The arguments of each run: `inputs`, and what a pipeline needs besides.

    Raises:
        UnsupportedModelError: neither a model nor a pipeline.
        InputError: a model without inputs, a generator among them, or arguments that lack, that the
            pipeline has not, or that contradict each other.
    """
    if not isinstance(pipe_or_model, nn.Module) and not components_of(pipe_or_model):
        coverage(pipe_or_model)  # it raises
    if inputs is not None and not isinstance(inputs, Mapping):
        raise InputError(f"inputs is a dict of arguments by name; got {type(inputs).__name__}")
    if steps < 1:
        raise InputError(f"steps must be above 0; got {steps}")
    if prompts is not None and not prompts:
        raise InputError("prompts must have at least one; got none. Leave them out for the usual")
    given = dict(inputs or {})
    if isinstance(pipe_or_model, nn.Module):
        if not given:
            raise InputError(
                f"a model by itself needs `inputs`, the arguments of its forward by name; got none "
                f"for {type(pipe_or_model).__name__}"
            )
        return given
    if "generator" in given:
        raise InputError(
            "every run needs a new generator of the same seed; got one. Give `seed` instead"
        )
    if prompts is not None and "prompt" in given:
        raise InputError(
            "prompts are given once; got `prompts` (--prompt), and prompt in `inputs` (--set). "
            "Leave one of them out"
        )
    parameters = inspect.signature(pipe_or_model.__call__).parameters
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {name: each for name, each in parameters.items() if each.kind in kinds}
    _refuse_unknown(pipe_or_model, given, list(named))
    usual = _usual(pipe_or_model, given, prompts, steps)
    given = {name: value for name, value in usual.items() if name in named} | given
    lacking = [
        name
        for name, parameter in named.items()
        if parameter.default is parameter.empty and name not in {*given, "generator"}
    ]
    if lacking:
        raise InputError(
            f"{type(pipe_or_model).__name__} needs {', '.join(lacking)}; got no such argument. "
            "Give it in `inputs`, or by --set NAME=VALUE"
        )
    return given


def _refuse_unknown(pipe: Any, given: Mapping[str, Any], named: Sequence[str]) -> None:
    """Where a pipeline takes **kwargs, a misspelt argument would pass, and change nothing."""
    for name in given:
        if named and name not in named:
            near = difflib.get_close_matches(name, named, 1, cutoff=0.75)
            mend = f"did you mean {near[0]}?" if near else "leave it out"
            raise InputError(f"{type(pipe).__name__} has no argument {name}; {mend}")


def _usual(
    pipe: Any, given: Mapping[str, Any], prompts: Sequence[str] | None, steps: int
) -> dict[str, Any]:
    """What pipelines get unless the user gave it."""
    usual: dict[str, Any] = {"num_inference_steps": steps, "output_type": "np"}
    if prompts is not None or "prompt_embeds" not in given:
        usual["prompt"] = list(PROMPTS if prompts is None else prompts)
    if device_of(pipe).type == "cpu" and not {"height", "width"} & given.keys():
        # With binning, a pipeline enlarges small pictures to its own sizes.
        usual |= {**_small(pipe), "num_frames": SMALL_VIDEO, "use_resolution_binning": False}
    usual["return_dict"] = False
    return usual


def _small(pipe: Any) -> dict[str, Any]:
    names = ("vae_scale_factor", "vae_scale_factor_spatial")
    found = (getattr(pipe, name, None) for name in names)
    side = SMALL_SIDE * next((factor for factor in found if isinstance(factor, int)), 8)
    return {"height": side, "width": side}
