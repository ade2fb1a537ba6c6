"""Whole diffusers models at real sizes: one forward on the default attention and on this one.

Configurations are the published ones, weights random: time, memory and routes do not depend on
them. The mask is copied in every forward, so that it is read and planned anew each time.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from textwrap import shorten
from typing import Any

import torch
from published_models import (
    MODELS,
    Inputs,
    Model,
    Size,
    build,
    forward_of,
    made_shallow,
    made_small,
    make_inputs,
)
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode

from diffusers_fa3 import available_kernels, coverage, disable_fa3, enable_fa3
from diffusers_fa3.layers.block_masks import lay_out_masks_of, spread_masks_of
from diffusers_fa3.tools.bench.methods import Method, host_syncs
from diffusers_fa3.tools.bench.run import versions
from diffusers_fa3.tools.bench.tables import Lines, markdown_of, table_of
from diffusers_fa3.tools.bench.timing import times_of

READS = {
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__index__,
    Tensor.__int__,
    Tensor.cpu,
    Tensor.item,
    Tensor.nonzero,
    Tensor.numpy,
    Tensor.tolist,
    torch.nonzero,
}
"""What would make the host wait for a GPU; counted by this where there is none."""
REFERENCE = "diffusers_fa3.kernels.providers.reference"
"""Module of the reference kernel, which reads lengths that a GPU's kernels take as they are."""


@dataclass(frozen=True)
class Forward:
    """One forward of a whole model."""

    ms: float
    """Median."""
    times_ms: tuple[float, ...]
    peak_gb: float | None
    """Most memory allocated, weights included; None: not on a GPU."""
    host_waits: int | None
    """On a GPU whatever waits for it, copies to it too; else reads alone; None: not counted."""


@dataclass(frozen=True)
class Row:
    """A model on one share of valid text."""

    model: str
    share: float | None
    compiled: bool
    size: Size
    failed: str = ""
    """Why ours, or both, were not measured."""
    parameters: int = 0
    default: Forward | None = None
    ours: Forward | None = None
    error: float | None = None
    """Of ours against the default; relative, as a Euclidean norm, of the worst sample."""
    kernels: tuple[str, ...] = ()
    routes: dict[str, int] = field(default_factory=dict)
    """Attention calls of one forward on a kernel."""
    fallbacks: int = 0
    choices: dict[str, int] = field(default_factory=dict)
    """With --kernel fastest: who was chosen in how many of these calls."""
    plans_made: int = 0
    plans_reused: int = 0
    graphs: int | None = None
    """How many were compiled for ours, in all rounds: one is what it takes; None: not compiled."""
    graph_breaks: int | None = None

    @property
    def speedup(self) -> float | None:
        """How many times faster than the default."""
        return self.default.ms / self.ours.ms if self.default and self.ours else None


class Switch:
    """A model's two sets of processors: always the same objects, or it would be compiled anew."""

    def __init__(self, network: nn.Module, kernel: str) -> None:
        self.network = network
        enable_fa3(network, kernel=kernel, fallback="error")
        self.ours = processors_of(network)
        disable_fa3(network)
        self.own = processors_of(network)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Our attention in this block, the default outside."""
        put(self.ours)
        for module in self.network.modules():
            spread_masks_of(module)
        try:
            yield
        finally:
            put(self.own)
            for module in self.network.modules():
                lay_out_masks_of(module)

    def did(self) -> dict[str, Any]:
        """What ours, which is on, did so far, as a row has it."""
        done = coverage(self.network)
        routes: Counter[str] = Counter()
        choices: Counter[str] = Counter()
        for layer in done.rows:
            routes.update(layer.calls)
            choices.update(layer.choices)
        return {
            "kernels": tuple(sorted({layer.kernel for layer in done.rows if layer.calls})),
            "routes": dict(routes),
            "fallbacks": done.fallbacks,
            "choices": dict(choices),
            "plans_made": done.plans_made,
            "plans_reused": done.plans_reused,
        }


def processors_of(network: nn.Module) -> dict[nn.Module, Any]:
    """The processor of each attention layer."""
    layers = (module for module in network.modules() if hasattr(module, "processor"))
    return {layer: layer.processor for layer in layers}


def put(processors: Mapping[nn.Module, Any]) -> None:
    """Give each layer its processor."""
    for layer, processor in processors.items():
        layer.processor = processor


def measure(model: Model, network: nn.Module, share: float | None, args: argparse.Namespace) -> Row:
    """Both attentions on one share of valid text, in turns; if ours fails, the default alone."""
    inputs = make_inputs(model, share, args.device)
    switch = Switch(network, args.kernel)
    run = forward_of(torch.compile(network) if args.compile else network)
    methods = {"default": Method(run), "ours": Method(run, switch.on)}
    parameters = sum(parameter.numel() for parameter in network.parameters())
    row = Row(model.name, share, args.compile, model.size, parameters=parameters)
    default = run(inputs)
    try:
        # What does ours give, and how? This warms up as well, and compiles.
        counters.clear()
        with switch.on():
            row = replace(row, error=error_of(run(inputs), default), **switch.did())
        row = replace(row, **forwards(methods, inputs, args))
        return replace(row, **graphs()) if args.compile else row
    except Exception as error:  # the default may do
        row = replace(row, failed=words_of(error))
    del methods["ours"]
    return replace(row, **forwards(methods, inputs, args))


def forwards(
    methods: dict[str, Method], inputs: Inputs, args: argparse.Namespace
) -> dict[str, Forward]:
    """What a forward costs on each attention."""
    costs = {name: cost_of(method, inputs, args) for name, method in methods.items()}
    times = times_of(methods, [inputs], args.rounds, args.device, calls=1)
    return {
        name: Forward(statistics.median(times[name]), tuple(times[name]), *costs[name])
        for name in methods
    }


def graphs() -> dict[str, int]:
    """What was compiled since the counters were cleared, as a row has it."""
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": counters["graph_break"].total(),
    }


def error_of(result: Tensor, default: Tensor) -> float:
    """Relative, as a Euclidean norm, of the worst sample."""
    difference, size = (x.float().flatten(1) for x in (result - default, default))
    return (difference.norm(dim=1) / size.norm(dim=1)).max().item()


def cost_of(
    method: Method, inputs: Inputs, args: argparse.Namespace
) -> tuple[float | None, int | None]:
    """The most memory of one forward, in GB, and how often it makes the host wait."""
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        waits = host_syncs(method, inputs)
        return torch.cuda.max_memory_allocated() / 1e9, waits
    # What is compiled would be compiled anew under a mode.
    return None, None if args.compile else host_reads(method, inputs)


class CountReads(TorchFunctionMode):
    """Counts calls that read a tensor's values, on the way to the kernel and back."""

    leaves_attention_alone = True
    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        caller = sys._getframe(1).f_globals.get("__name__", "")
        self.count += func in READS and not caller.startswith(REFERENCE)
        return func(*args, **(kwargs or {}))


def host_reads(method: Method, inputs: Inputs) -> int:
    """How often one call would make the host wait for a GPU, by what it asks of tensors."""
    with method.around(), CountReads() as reads:
        method.run(inputs)
    return reads.count


def measure_all(model: Model, args: argparse.Namespace) -> Iterator[Row]:
    """A row for every share of valid text; a failure is one, too."""
    shares = [share for share in model.shares if share is None or not args.compile]
    network = None
    for share in shares:
        try:
            network = build(model, args.device) if network is None else network
            yield measure(model, network, share, args)
        except Exception as error:  # the next one may do
            yield Row(model.name, share, args.compile, model.size, failed=words_of(error))
        free(args.device)


def words_of(error: Exception) -> str:
    """What went wrong, not at length."""
    return shorten(f"{type(error).__name__}: {error}", 300)


def free(device: str) -> None:
    """Give back what is no longer used, compiled code among it."""
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def table(rows: list[Row]) -> Lines:
    """Every row in words."""
    head = ("model", "valid text", "tokens", "parameters", "default", "ours", "speedup")
    costs = ("peak memory", "host waits", "error", "attention calls", "plans")
    return [(*head, *costs), *map(cells, rows)]


def cells(row: Row) -> tuple[str, ...]:
    """One row in words; pairs are default / ours."""
    share = "no mask" if row.share is None else f"{100 * row.share:.3g}%"
    where = (
        f"{row.model}, compiled" if row.compiled else row.model,
        share,
        f"{row.size.batch} x ({row.size.image} + {row.size.text})",
    )
    calls = [f"{route} {count}" for route, count in row.routes.items()]
    calls += [f"default {row.fallbacks}"] if row.fallbacks else []
    calls += [f"the fastest: {choice}, {count} times" for choice, count in row.choices.items()]
    if row.graphs is not None:
        calls += [f"{row.graphs} graphs, {row.graph_breaks} breaks"]
    calls += [row.failed] if row.failed else []
    both = (row.default, row.ours)
    return (
        *where,
        f"{row.parameters / 1e9:.2f} B",
        *("failed" if each is None else f"{each.ms:.2f} ms" for each in both),
        "-" if row.speedup is None else f"{row.speedup:.2f}x",
        " / ".join("-" if x is None or x.peak_gb is None else f"{x.peak_gb:.2f} GB" for x in both),
        " / ".join("-" if x is None or x.host_waits is None else f"{x.host_waits}" for x in both),
        "-" if row.error is None else f"{row.error:.1e}",
        ", ".join(calls),
        f"{row.plans_made} made, {row.plans_reused} reused",
    )


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    names = [model.name for model in MODELS]
    kernels = ["auto", "fastest", *(row.name for row in available_kernels())]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kernel", choices=kernels, default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, help="at most so many blocks; else all, qwenimage 20")
    parser.add_argument("--compile", action="store_true", help="torch.compile; only without masks")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the program")
    parser.add_argument("--json", help="also write the numbers to this file")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    return parser.parse_args()


def main() -> int:
    """Measure and print; 1 where something failed."""
    args = parse_args()
    about = versions(args.device, args.kernel)
    models = [model for model in MODELS if model.name in args.models]
    rows: list[Row] = []
    with torch.no_grad():
        for model in track(models, description="measuring"):
            fitting = made_shallow(made_small(model) if args.small else model, args.layers)
            rows.extend(measure_all(fitting, args))
            free(args.device)

    if args.json:
        results = [asdict(row) | {"speedup": row.speedup} for row in rows]
        everything = {"versions": about, "command": sys.argv[1:], "rows": results}
        with open(args.json, "w") as file:
            json.dump(everything, file, indent=1)
    print(", ".join(f"{name} {value}" for name, value in about.items() if value))
    if args.markdown:
        print(markdown_of(table(rows)))
    else:
        console = Console(width=None if sys.stdout.isatty() else 200)
        console.print(table_of(table(rows), "one forward"))
    # Under torch.compile, that ours fails is a finding.
    return int(any(row.failed and not (row.compiled and row.default) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
