"""A pipeline by its folder or name, loaded without a word."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from diffusers_fa3.errors import InputError

MOST = 300
"""Characters of another library's error that are told."""


def load(model: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The pipeline.

    Raises:
        InputError: there is none, or it cannot be loaded.
    """
    import diffusers

    pipelines: Any = diffusers.DiffusionPipeline
    folder = Path(model)
    if (folder / "config.json").is_file() and not (folder / "model_index.json").exists():
        raise InputError(
            f"{model} is a model, not a pipeline: give its parent folder, or use "
            "check_parity(model, inputs) from Python"
        )
    try:
        with warnings.catch_warnings():
            # diffusers is about to rename the argument; older ones know no other name.
            warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")
            pipe = pipelines.from_pretrained(model, torch_dtype=dtype)
        return pipe.to(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # from files, the hub and the classes that the pipeline names
        why = f"{type(error).__name__}: {_shortened(str(error))}"
        if not folder.is_dir() and not _came_from_hub(model):
            why = (
                "no such folder, and the hub has no such name or cannot be reached. A gated one "
                "needs `hf auth login`"
            )
        raise InputError(
            "MODEL must be a pipeline of diffusers that can be loaded, a folder or a name on the "
            f"hub; got {model}: {why}"
        ) from error


def _came_from_hub(name: str) -> bool:
    """Whether the hub gave the first file of a pipeline, now or before."""
    from huggingface_hub import try_to_load_from_cache

    with suppress(ValueError):  # no name that the hub could have
        return isinstance(try_to_load_from_cache(name, "model_index.json"), str)
    return False


def _shortened(text: str) -> str:
    """The first sentences of a text."""
    text = text.strip()
    if len(text) <= MOST:
        return text
    sentences, dot, _ = text[:MOST].rpartition(". ")
    return f"{sentences}{dot}".strip() or f"{text[:MOST]} ..."


@contextmanager
def quiet() -> Iterator[None]:
    """Keep diffusers and transformers from printing: bars of their own, and what they advise."""
    libraries = [name for name in ("diffusers", "transformers") if find_spec(name) is not None]
    logs: list[Any] = [import_module(f"{name}.utils.logging") for name in libraries]
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.disable_progress_bar()
        log.set_verbosity_error()
    try:
        yield
    finally:
        for log, level in zip(logs, levels):
            log.enable_progress_bar()
            log.set_verbosity(level)
