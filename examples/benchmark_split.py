"""Time the Python of one attention call over split tokens, kernel and collectives aside.

    python examples/benchmark_split.py

The kernel returns its queries, and the collectives return at once, so no other process is needed;
what is left is Python and the copies into the layouts that are sent, of tensors so small that they
take no time. One thread; medians of calls in turns, as `measure_overhead` has them.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from diffusers_fa3.attention import attend
from diffusers_fa3.parallel import Memory, attend_split, exchange
from diffusers_fa3.parallel.exchange import Axes, Group
from diffusers_fa3.tools.bench.methods import Method
from diffusers_fa3.tools.bench.run import versions
from diffusers_fa3.tools.bench.timing import times_of

CALLS = 200


def kernel(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, out: Any = None) -> Tensor:
    """A kernel that takes no time, and can write into `out`."""
    return q if out is None else out


def at_once(*_: Any, **__: Any) -> None:
    """A collective that takes no time."""


def axes(ulysses: int, ring: int) -> Axes:
    """As the first rank has them."""
    return Axes(
        Group("ulysses", ulysses, 0), Group("ring", ring, 0), Group("all", ulysses * ring, 0), False
    )


def methods(x: Tensor) -> dict[str, Method]:
    options: dict[str, Any] = {"scale": None, "kernel": kernel}
    forgetful = Memory(lambda mask, call, make: make(), lambda mask, call, make: make())
    split: dict[str, Any] = {"axes_2d": "bk", "pack_queries": False, "switch_id": 0}
    split |= {"memory": forgetful, "decline": at_once, **options}

    def call(which: Axes, _: object) -> object:
        return attend_split(x, x, x, None, which, **split)

    return {
        "one process": Method(lambda _: attend(x, x, x, None, causal=False, **options)),
        "U2": Method(partial(call, axes(2, 1))),
        "R2": Method(partial(call, axes(1, 2))),
        "U2R2": Method(partial(call, axes(2, 2))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    x = torch.randn(1, 8, 2, 8)
    with (
        torch.inference_mode(),
        mock.patch.object(dist, "all_to_all_single", at_once),
        mock.patch.object(exchange, "_gather_parts", at_once),
        mock.patch.object(exchange, "_resolve", at_once),
    ):
        times = times_of(methods(x), [None], rounds, "cpu", CALLS)
    table = Table("call", "us")
    for name, milliseconds in times.items():
        table.add_row(name, f"{statistics.median(milliseconds) * 1e3:.1f}")
    console = Console()
    console.print(table)
    console.print(
        ", ".join(f"{name} {version}" for name, version in versions("cpu", "reference").items())
    )


if __name__ == "__main__":
    main()
