"""Whole models split over several GPUs: ours, diffusers' own attentions and one GPU, in turns.

    torchrun --nproc-per-node 2 examples/benchmark_parallel.py --models flux wan
    torchrun --nproc-per-node 4 examples/benchmark_parallel.py --models flux --compile
    torchrun --nproc-per-node 2 examples/benchmark_parallel.py --device cpu --small

Configurations are the published ones, weights random. Each method has a model of its own, and all
share their weights. Ranks start a forward together; the time is that of the slowest. A first
forward that takes longer than --limit ends the program, and tells where each rank stands.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from benchmark_models import error_of, free, words_of
from diffusers.utils import logging
from published_models import (
    MODELS,
    Inputs,
    Model,
    build,
    forward_of,
    made_shallow,
    made_small,
    make_inputs,
)
from rich.console import Console
from splitting import split_tokens
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from diffusers_fa3 import available_kernels, coverage, cp_plan, enable_fa3
from diffusers_fa3.parallel.exchange import sent
from diffusers_fa3.tools.bench.run import versions
from diffusers_fa3.tools.bench.tables import Lines, markdown_of, table_of

OURS, DEFAULT, CUDNN = "ours", "native", "_native_cudnn"
"""Attentions: this package's, and two backends of diffusers."""
MESSAGE = 16 << 20
"""Values of float32 in a message whose time is taken."""


class Way(NamedTuple):
    """How many ranks trade tokens for heads, and how many gather keys; 1 and 1 is one GPU."""

    ulysses: int = 1
    ring: int = 1

    def __str__(self) -> str:
        parts = (f"{name}{n}" for name, n in (("U", self.ulysses), ("R", self.ring)) if n > 1)
        return "".join(parts) or "one GPU"

    def degrees(self, uneven: bool) -> dict[str, Any]:
        """The arguments of diffusers' `ContextParallelConfig`."""
        degrees: dict[str, Any] = {"ulysses_degree": self.ulysses, "ring_degree": self.ring}
        if uneven:
            degrees["ulysses_anything" if self.ring == 1 else "ring_anything"] = True
        return degrees

    def sends(self, tensor: int) -> float:
        """What a rank sends in a call by formula; q, k, v and the output have these bytes each."""
        ranks = self.ulysses * self.ring
        to_trade = 4 * (self.ulysses - 1) * tensor / (ranks * self.ulysses)
        return to_trade + 2 * (self.ring - 1) * tensor / ranks


ONE = Way()


@dataclass(frozen=True)
class Found:
    """What one rank found of a method."""

    failed: str = ""
    first_s: float = 0.0
    error: float = 0.0
    peak_gb: float | None = None
    busy_ms: float | None = None
    messages_ms: float | None = None
    sent_mb: float = 0.0
    calls: str = ""
    times_ms: tuple[float, ...] = ()
    host_ms: tuple[float, ...] = ()
    """Until the call came back, in each round."""


@dataclass(frozen=True)
class Row:
    """A method on one model and share of valid text."""

    model: str
    share: float | None
    compiled: bool
    tokens: str
    attention: str
    way: str
    failed: str
    first_s: float
    """Seconds of the first forward, in which kernels load and graphs are compiled."""
    times_ms: tuple[float, ...]
    """Of the slowest rank in each round."""
    host_ms: float
    """Until the call came back, as a median: the host's share, if it is less than `ms`."""
    error: float
    """Against the default on one GPU: relative, as a Euclidean norm, of the worst sample."""
    peak_gb: float | None
    """Most memory allocated in a forward, weights included; None: not on a GPU."""
    busy_ms: float | None
    """Of kernels on the GPU, those of messages aside; None: not on a GPU."""
    messages_ms: float | None
    """Of kernels that send and receive; these wait for the other ranks, too."""
    sent_mb: float
    """By a rank in a forward, masks included. Only ours counts, and not in graphs."""
    formula_mb: float
    """The same by formula, without masks."""
    calls: str
    """Of ours: kernels and routes."""

    @property
    def ms(self) -> float | None:
        """Median."""
        return statistics.median(self.times_ms) if self.times_ms else None


class Method:
    """A model with one attention, split in one way."""

    def __init__(self, attention: str, way: Way) -> None:
        self.attention, self.way = attention, way

    def build(self, base: nn.Module, uneven: bool, args: argparse.Namespace) -> None:
        """Make the model: switched, then split; its first forward compiles it."""
        self.model: Any = sharing_weights(base)
        plan = None
        if self.attention == OURS:
            enable_fa3(self.model, kernel=args.kernel, fallback="silent")  # `calls` tells
            plan = cp_plan(self.model) if self.way != ONE else None
        else:
            self.model.set_attention_backend(self.attention)
        if self.way != ONE:
            split_tokens(self.model, plan, **self.way.degrees(uneven))
        if args.compile:
            self.model.compile_repeated_blocks(fullgraph=True)
        self.run = forward_of(self.model)


def sharing_weights(model: nn.Module) -> nn.Module:
    """A copy of modules and processors, on the same parameters and buffers."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def fits(share: float | None, model: Model) -> bool:
    """Whether the model takes such a mask, or goes without one as published."""
    return bool(model.mask_name) if share is not None else None in model.shares


def methods_of(args: argparse.Namespace) -> list[Method]:
    """One GPU first, by the default: the others are compared with it."""
    ranks = dist.get_world_size()
    ways = [Way(u, ranks // u) for u in range(ranks, 0, -1) if ranks % u == 0]
    asked = [way for way in ways if not args.ways or str(way) in args.ways]
    split = [Method(attention, way) for way in asked for attention in args.attentions]
    return [Method(DEFAULT, ONE), Method(OURS, ONE), *split]


def measure(
    model: Model, share: float | None, base: nn.Module, args: argparse.Namespace
) -> list[Row]:
    """Rows of all methods; one that fails is a row, too."""
    inputs = make_inputs(model, share, args.device)
    parts = parts_of(model, inputs)
    uneven = any(part % dist.get_world_size() for part in parts)
    methods = methods_of(args)
    found: list[Found] = []
    default: Tensor | None = None
    for method in methods:
        try:
            method.build(base, uneven, args)
            output, first_s = first_forward(method, inputs, args)
            default = output if default is None else default
            first = Found(first_s=first_s, error=error_of(output, default))
            found.append(replace(first, **cost_of(method, inputs, args)))
        except Exception as error:  # the next one may do
            found.append(Found(failed=words_of(error)))
        say(f"{model.name} {share}: {method.attention} {method.way} {found[-1].failed}")
    able = [n for n, each in enumerate(found) if not each.failed]
    for _ in range(args.rounds):
        for n in able:
            ms, host_ms = timed(methods[n], inputs, args)
            times, hosts = found[n].times_ms, found[n].host_ms
            found[n] = replace(found[n], times_ms=(*times, ms), host_ms=(*hosts, host_ms))
    tokens = f"{model.size.batch} x ({' + '.join(map(str, parts))})"
    about = (model.name, share, args.compile, tokens)
    tensor = tensor_bytes(model, parts)
    blocks = sum(model.config[name] for name in model.depths)
    return [
        row_of(about, method, each, method.way.sends(tensor) * blocks / 1e6)
        for method, each in zip(methods, found)
    ]


def parts_of(model: Model, inputs: Inputs) -> list[int]:
    """Tokens of the image, and of each text beside it, if they attend together."""
    if not model.joint:
        return [model.size.image]
    texts = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    return [model.size.image, *(inputs[name].shape[1] for name in texts if name in inputs)]


def tensor_bytes(model: Model, parts: Sequence[int]) -> int:
    """Of q in one call, of all tokens."""
    width = model.config["num_attention_heads"] * model.config["attention_head_dim"]
    return model.size.batch * sum(parts) * width * torch.bfloat16.itemsize


def first_forward(method: Method, inputs: Inputs, args: argparse.Namespace) -> tuple[Tensor, float]:
    """What comes out, and seconds. A forward that is stuck ends the program and tells where."""
    faulthandler.dump_traceback_later(args.limit, exit=True)
    start = time.perf_counter()
    try:
        output = method.run(inputs)
        wait(args.device)
    finally:
        faulthandler.cancel_dump_traceback_later()
    return output, time.perf_counter() - start


def cost_of(method: Method, inputs: Inputs, args: argparse.Namespace) -> dict[str, Any]:
    """What was sent and what served, in a second forward; memory and kernels' time on a GPU."""
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    sent.clear()
    before = calls_of(method)
    method.run(inputs)
    wait(args.device)
    bytes_sent = sum(count for what, count in sent.items() if what.endswith("bytes"))
    calls = ", ".join(f"{what} {n}" for what, n in (calls_of(method) - before).items())
    found = {"sent_mb": bytes_sent / 1e6, "calls": calls}
    if args.device != "cuda":
        return found
    found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        method.run(inputs)
        wait(args.device)
    kernels: Counter[bool] = Counter()
    for event in profiled.events():
        kernels["nccl" in event.name] += event.device_time_total
    return found | {"busy_ms": kernels[False] / 1e3, "messages_ms": kernels[True] / 1e3}


def calls_of(method: Method) -> Counter[str]:
    """Of ours, the attention calls so far by kernel and route, and those left to the default."""
    calls: Counter[str] = Counter()
    for row in coverage(method.model).rows if method.attention == OURS else ():
        calls.update({f"{row.kernel} {route}": count for route, count in row.calls.items()})
        calls.update({f"default: {reason}": count for reason, count in row.fallbacks.items()})
    return calls


def timed(method: Method, inputs: Inputs, args: argparse.Namespace) -> tuple[float, float]:
    """Milliseconds of a forward that all ranks start together, and until the call came back."""
    wait(args.device)
    dist.barrier()
    start = time.perf_counter()
    method.run(inputs)
    back = time.perf_counter()
    wait(args.device)
    return (time.perf_counter() - start) * 1e3, (back - start) * 1e3


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def row_of(about: tuple[Any, ...], method: Method, mine: Found, formula_mb: float) -> Row:
    """What all ranks found, in one; memory, kernels' times and calls are the first rank's."""
    ranks: list[Found] = [mine] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    hosts = [statistics.median(found.host_ms) for found in ranks if found.host_ms]
    return Row(
        *about,
        method.attention,
        str(method.way),
        failed=next((found.failed for found in ranks if found.failed), ""),
        first_s=max(found.first_s for found in ranks),
        times_ms=tuple(map(max, zip(*(found.times_ms for found in ranks)))),
        host_ms=max(hosts, default=0.0),
        error=max((found.error for found in ranks), key=lambda x: (math.isnan(x), x)),
        peak_gb=mine.peak_gb,
        busy_ms=mine.busy_ms,
        messages_ms=mine.messages_ms,
        sent_mb=max(found.sent_mb for found in ranks),
        formula_mb=formula_mb,
        calls=mine.calls,
    )


def message_rate(args: argparse.Namespace) -> float:
    """Bytes that a rank sends in a second: the median of gathers of 64 MB."""
    ranks = dist.get_world_size()
    part = torch.zeros(MESSAGE if args.device == "cuda" else MESSAGE // 16, device=args.device)
    whole = part.new_empty(ranks * len(part))
    seconds = []
    for _ in range(20):
        wait(args.device)
        dist.barrier()
        start = time.perf_counter()
        dist.all_gather_into_tensor(whole, part)
        wait(args.device)
        seconds.append(time.perf_counter() - start)
    return part.nbytes * (ranks - 1) / statistics.median(seconds)


def table(rows: Sequence[Row], rate: float) -> Lines:
    """Rows of one model and share, in words."""
    head = ("attention", "way", "ms", "host", "kernels + messages", "of one GPU", "floor", "error")
    lines: Lines = [(*head, "peak memory", "sent / formula", "first", "calls")]
    one = {row.attention: row.ms for row in rows if row.way == str(ONE)}
    for row in rows:
        if row.failed or row.ms is None:
            lines.append((row.attention, row.way, "failed", *[""] * 8, row.failed))
            continue
        ours, default = one.get(OURS), one.get(DEFAULT)
        ranks = dist.get_world_size()
        floor = None if ours is None else ours / ranks + row.formula_mb * 1e9 / rate
        speedups = [f"{base / row.ms:.2f}x" if base else "-" for base in (default, ours)]
        lines.append(
            (
                row.attention,
                row.way,
                f"{row.ms:.1f}",
                f"{row.host_ms:.1f}",
                "-" if row.busy_ms is None else f"{row.busy_ms:.1f} + {row.messages_ms:.1f}",
                " / ".join(speedups),
                "" if floor is None or not row.formula_mb else f"{floor:.1f}",
                f"{row.error:.1e}",
                "-" if row.peak_gb is None else f"{row.peak_gb:.1f} GB",
                f"{row.sent_mb:.0f} / {row.formula_mb:.0f} MB",
                f"{row.first_s:.1f} s",
                row.calls,
            )
        )
    return lines


def say(words: str) -> None:
    """On the first rank."""
    if dist.get_rank() == 0:
        print(words, flush=True)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    names = [model.name for model in MODELS if "num_attention_heads" in model.config]
    kernels = ["auto", "fastest", *(row.name for row in available_kernels())]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--ways", nargs="+", metavar="WAY", help="such as U2, R2, U2R2; else all")
    attentions = (DEFAULT, CUDNN, OURS)
    parser.add_argument(
        "--attentions", nargs="+", choices=attentions, default=attentions, help="of split models"
    )
    parser.add_argument("--shares", nargs="+", type=share, help="of valid text, or none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kernel", choices=kernels, default="auto")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, help="at most so many blocks")
    parser.add_argument("--limit", type=float, default=300, help="seconds of a first forward")
    parser.add_argument("--compile", action="store_true", help="compile each block")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the program")
    parser.add_argument("--json", help="also write the numbers to this file")
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    return parser.parse_args()


def share(text: str) -> float | None:
    return None if text == "none" else float(text)


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 where something of ours failed."""
    about = versions(args.device, args.kernel)
    rate = message_rate(args)
    console = Console(quiet=dist.get_rank() > 0, width=None if sys.stdout.isatty() else 220)
    console.print(", ".join(f"{name} {value}" for name, value in about.items() if value))
    console.print(f"{dist.get_world_size()} ranks, messages of {rate / 1e9:.1f} GB/s")
    rows: list[Row] = []
    for model in (model for model in MODELS if model.name in args.models):
        # Wan's own number of heads does not divide by 8.
        heads = 12 if model.name == "wan" else max(2, dist.get_world_size())
        fitting = made_shallow(made_small(model, heads) if args.small else model, args.layers)
        base = build(fitting, args.device)
        asked = [share for share in args.shares if fits(share, model)] if args.shares else None
        for valid in asked or fitting.shares:
            found = measure(fitting, valid, base, args)
            rows += found
            title = f"{model.name}, {'no mask' if valid is None else f'{100 * valid:.3g}% valid'}"
            lines = table(found, rate)
            console.print(markdown_of(lines) if args.markdown else table_of(lines, title))
            free(args.device)
    if args.json and dist.get_rank() == 0:
        everything = {"versions": about, "command": sys.argv[1:], "bytes_per_s": rate}
        with open(args.json, "w") as file:
            json.dump(everything | {"rows": [asdict(row) for row in rows]}, file, indent=1)
    return int(any(row.failed and row.attention == OURS for row in rows))


def main() -> int:
    args = parse_args()
    logging.set_verbosity_error()  # that parallelism is experimental
    torch._dynamo.config.recompile_limit = 64  # the models of all methods share their code
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(1)
    # With gloo beside NCCL, ranks whose sizes differ tell them to each other without a GPU.
    backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "cpu:gloo"
    device = torch.device("cuda", torch.cuda.current_device()) if args.device == "cuda" else None
    dist.init_process_group(backend, timeout=timedelta(seconds=args.limit), device_id=device)
    try:
        with torch.no_grad():
            return run(args)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
