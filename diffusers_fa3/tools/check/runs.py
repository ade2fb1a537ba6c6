"""One run of a pipeline or model: the latents after each step, and the result."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusers_fa3.errors import FA3Error, InputError
from diffusers_fa3.tools.check.kept import gpus_of

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Run:
    """What came out."""

    latents: tuple[Array, ...]
    """After each step; empty for a model, and where the pipeline has no callback."""
    result: Array | None
    """Pictures, a video, or the model's output; None if it is none of them."""


def run(
    pipe_or_model: Any, arguments: Mapping[str, Any], seed: int, on_step: Callable[[], None]
) -> Run:
    """Run with the noise of `seed`, without gradients."""
    for generator in _default_generators(pipe_or_model):
        generator.manual_seed(seed)
    arguments = dict(arguments)
    with torch.no_grad():
        if isinstance(pipe_or_model, nn.Module):
            return Run((), _as_array(pipe_or_model(**arguments)))
        parameters = inspect.signature(pipe_or_model.__call__).parameters
        latents: list[Array] = []

        def after_step(*args: Any, **kwargs: Any) -> dict[str, Any]:
            found = kwargs.get("latents", args[-1])
            if isinstance(found, dict):
                found = found.get("latents")
            if isinstance(found, Tensor):
                latents.append(_numbers(found))
            on_step()
            return {}

        if "generator" in parameters:
            arguments["generator"] = torch.Generator().manual_seed(seed)
        if "callback_on_step_end" in parameters:
            arguments.setdefault("callback_on_step_end", after_step)
        elif {"callback", "callback_steps"} <= parameters.keys():
            arguments |= {"callback": after_step, "callback_steps": 1}
        result = _as_array(pipe_or_model(**arguments))
        return Run(tuple(latents), result)


@contextmanager
def must_run(
    how: str = "on its default attention",
    mend: str = "Give the arguments that it needs by `inputs`, or by --set NAME=VALUE",
) -> Iterator[None]:
    """Tell an error of the model itself as one of what it was given."""
    try:
        yield
    except (FA3Error, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(
            f"the model must run {how}; got {type(error).__name__}: {error}. {mend}"
        ) from error


def words_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as they are told in a report: tensors and other objects in a word."""
    return {name: _word_of(value) for name, value in arguments.items()}


def _word_of(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return [_word_of(item) for item in value]
    return type(value).__name__


def _default_generators(pipe_or_model: Any) -> list[torch.Generator]:
    """Those of the devices in use; `torch.manual_seed` would set all devices."""
    return [
        torch.default_generator,
        *(torch.cuda.default_generators[i] for i in gpus_of(pipe_or_model)),
    ]


def _as_array(output: Any) -> Array | None:
    """The first of what was returned, as numbers; pictures of Pillow count from 0 to 1."""
    if isinstance(output, dict):
        output = next(iter(output.values()))
    elif isinstance(output, tuple):
        output = output[0]
    if isinstance(output, Tensor):
        return _numbers(output)
    if isinstance(output, np.ndarray):
        return output
    if isinstance(output, list) and output:
        found = [_as_array(item) for item in output]
        parts = [part for part in found if part is not None]
        if len(parts) < len(output):
            return None
        alike = len({part.shape for part in parts}) == 1
        return np.stack(parts) if alike else np.concatenate([part.ravel() for part in parts])
    if hasattr(output, "getbands"):  # of Pillow
        return np.asarray(output.convert("RGB")) / 255
    return None


def _numbers(tensor: Tensor) -> Array:
    """A copy, which the run does not change any more."""
    wide = tensor.dtype if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().to("cpu", wide, copy=True).numpy()
