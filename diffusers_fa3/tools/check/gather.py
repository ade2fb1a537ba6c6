"""What each rank of a check has, given to all."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

Found = TypeVar("Found")


def of_all_ranks(mine: Found) -> list[Found]:
    """What each rank has, in their order."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found
