"""Which models of a pipeline are split over ranks, and how."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, ModelMixin

from diffusers_fa3.errors import UnsupportedModelError
from diffusers_fa3.layers import record_of
from diffusers_fa3.parallel import cp_plan
from diffusers_fa3.tools.check.kept import modules_of

Mode = dict[str, int | bool]
"""Arguments of `ContextParallelConfig`."""


def models_to_split(pipe: Any) -> list[Any]:
    """The models whose layers are switched, each once.

    Raises:
        UnsupportedModelError: one of them has no plan, or none is a model of diffusers.
    """
    records = (record_of(getattr(module, "processor", None)) for module in modules_of(pipe))
    homes = (record.home for record in records if record is not None)
    models: list[Any] = list(dict.fromkeys(home.model for home in homes if home is not None))
    if not models:
        raise UnsupportedModelError(
            "only a model of diffusers can be split over ranks; got none with attention layers in "
            f"{type(pipe).__name__}. Check it without --ranks"
        )
    try:
        for model in models:
            cp_plan(model)
    except UnsupportedModelError:
        models = _outermost(models, pipe)
    for model in models:
        try:
            cp_plan(model)
        except UnsupportedModelError as error:
            why = str(error).partition(". Run it on one GPU")[0]
            raise UnsupportedModelError(f"{why}. Check it without --ranks") from error
    return models


def _outermost(models: Sequence[Any], pipe: Any) -> list[Any]:
    """The models of diffusers that these are parts of, as a user knows them."""
    whole: list[Any] = []
    for module in modules_of(pipe):  # from the outermost in
        inside = any(module in set(outer.modules()) for outer in whole)
        if isinstance(module, ModelMixin) and not inside and {*models} & {*module.modules()}:
            whole.append(module)
    return whole


def mode_for(heads: Sequence[int | None], ranks: int) -> Mode:
    """Ulysses where the heads of every model can be shared out; else a ring.

    Any number of tokens will do, where diffusers can split it: it is unknown before a run.
    """
    way = "ulysses" if all(number and number % ranks == 0 for number in heads) else "ring"
    anything = f"{way}_anything"
    any_number: Mode = {anything: True} if hasattr(ContextParallelConfig, anything) else {}
    return {f"{way}_degree": ranks, **any_number}


def heads_of(model: Any) -> int | None:
    """The number of heads, if the configuration tells it under the usual name."""
    heads = getattr(model.config, "num_attention_heads", None)
    return heads if isinstance(heads, int) else None


def split(models: Sequence[Any], mode: Mode) -> None:
    """Have diffusers split the tokens of the models over all ranks."""
    # To name a rank's device, diffusers divides by the number of accelerators, which is 0 without a
    # GPU. There, and for this call alone, there is one for each rank.
    one_for_each = mock.patch("torch.accelerator.device_count", dist.get_world_size)
    for model in models:
        config: Any = ContextParallelConfig(**mode)  # type: ignore[no-untyped-call]  # diffusers gives it no types
        with nullcontext() if torch.accelerator.device_count() else one_for_each:
            model.enable_parallelism(config=config, cp_plan=cp_plan(model))


def words_of_mode(mode: Mode) -> str:
    """As a caller would write it."""
    return ", ".join(f"{name}={value}" for name, value in mode.items())
