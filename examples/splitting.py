"""Split a model's tokens over ranks, where there are GPUs and where there are none."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from torch import nn


def split_tokens(model: nn.Module, plan: dict[str, Any] | None, **degrees: Any) -> None:
    """`model.enable_parallelism` by a plan, None for diffusers' own.

    To name a rank's device, diffusers divides by the number of accelerators, which is 0 without a
    GPU. There, and for this call alone, there is one for each rank.
    """
    one_for_each = mock.patch("torch.accelerator.device_count", dist.get_world_size)
    with nullcontext() if torch.accelerator.device_count() else one_for_each:
        model.enable_parallelism(config=ContextParallelConfig(**degrees), cp_plan=plan)
