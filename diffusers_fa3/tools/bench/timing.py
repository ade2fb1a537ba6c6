"""Time methods in turns, and measure the Python overhead of a switched layer."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn import functional as F

from diffusers_fa3.layers import enable_fa3
from diffusers_fa3.tools.bench.methods import Method

WARM_UP = 3
"""Rounds that are not counted."""


def times_of(
    runs: dict[str, Method], sets: Sequence[object], rounds: int, device: str, calls: int
) -> dict[str, list[float]]:
    """Milliseconds per call of each method. Methods take turns; each call gets the next inputs."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    rotated = itertools.cycle(sets)
    clock = _time_cuda if device == "cuda" else _time_cpu
    for turn in range(WARM_UP + rounds):
        for name, method in runs.items():
            inputs = [next(rotated) for _ in range(calls)]
            with method.around():
                milliseconds = clock(method, inputs)
            if turn >= WARM_UP:
                times[name].append(milliseconds)
    return times


def _time_cpu(method: Method, inputs: list[object]) -> float:
    start = time.perf_counter()
    for each in inputs:
        method.run(each)
    return (time.perf_counter() - start) * 1e3 / len(inputs)


def _time_cuda(method: Method, inputs: list[object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch gives it no types
    start.record()
    for each in inputs:
        method.run(each)
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / len(inputs)


def _nothing(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
    """A kernel that takes no time, so that only the overhead around it is measured."""
    return q


def measure_overhead(rounds: int) -> tuple[float, float]:
    """Extra microseconds per call of a switched layer, without kernels; and their noise.

    This is the time of a layer on a kernel that does nothing, minus the time of the layer on its
    default attention without the attention call itself. Measured on one thread, with tensors so
    small that only Python takes time.
    """
    layer = Attention(16, heads=2, dim_head=8).eval()
    switched = Attention(16, heads=2, dim_head=8).eval()
    enable_fa3(switched, kernel=_nothing, fallback="error")
    x = torch.randn(1, 8, 16)
    q = torch.randn(1, 2, 8, 8)
    runs: dict[str, Method] = {
        "default": Method(layer),
        "sdpa": Method(lambda _: F.scaled_dot_product_attention(q, q, q)),
        "ours": Method(switched),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = times_of(runs, [x], rounds, "cpu", calls=500)
    torch.set_num_threads(threads)
    default, sdpa, ours = (statistics.median(times[name]) for name in runs)
    overhead = (ours - (default - sdpa)) * 1e3
    of_rounds = [(c - (a - b)) * 1e3 for a, b, c in zip(*times.values(), strict=True)]
    return overhead, statistics.median(abs(each - overhead) for each in of_rounds)
