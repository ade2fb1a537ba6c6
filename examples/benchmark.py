"""Time attention with a mask: PyTorch's own against the packed kernel, interleaved, in one run.

    python examples/benchmark.py
    python examples/benchmark.py --device cuda --dtype bfloat16

Each batch is [text, padding, image], as Qwen-Image lays it out. The ideal is what the padding
leaves to compute: B * Sq * Sk over the sum of q_i * k_i. The bare kernel gets tensors that are
packed already: what a call takes longer is the packing. Ratios are of medians; the planning of a
mask, which a model does once per forward and not once per layer, stands in a column of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from diffusers.models.attention_processor import Attention
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional as F

from diffusers_fa3 import (
    PackingPlan,
    attention,
    enable_fa3,
    flash_attn_varlen_func,
    plan_packing,
)

COLUMNS = (
    "dtype",
    "valid text",
    "route",
    "default",
    "ours",
    "bare kernel",
    "plan",
    "speedup",
    "of ideal",
)
VALID = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Shape:
    """One attention call: B samples of text and image tokens, H heads of size D."""

    batch: int = 4
    text: int = 512
    image: int = 1024
    heads: int = 8
    head_dim: int = 64

    @property
    def length(self) -> int:
        """Sq and Sk."""
        return self.text + self.image


@dataclass(frozen=True)
class Row:
    """Medians of one share of valid text."""

    dtype: str
    valid: str
    route: str
    default_ms: float
    ours_ms: float
    kernel_ms: float
    plan_ms: float
    ideal: float

    @property
    def speedup(self) -> float:
        """How many times faster than PyTorch's attention with the same mask."""
        return self.default_ms / self.ours_ms

    @property
    def of_kernel(self) -> float:
        """The time of the bare kernel as a share of ours."""
        return self.kernel_ms / self.ours_ms

    @property
    def of_ideal(self) -> float:
        """The speedup as a share of what the padding leaves to be saved."""
        return self.speedup / self.ideal


def gap_mask(shape: Shape, valid: float, device: str) -> torch.Tensor:
    """(B, 1, 1, Sk) bool, [text, padding, image]; samples differ by up to half of the share."""
    spread = torch.linspace(0.5, 1.5, shape.batch) if valid < 1 else torch.ones(shape.batch)
    lengths = (shape.text * valid * spread).round().clamp(1, shape.text).int()
    position = torch.arange(shape.length)
    seen = (position < lengths[:, None]) | (position >= shape.text)
    return seen[:, None, None].to(device)


def median_times(
    runs: dict[str, Callable[[], object]], rounds: int, device: str, calls: int = 1
) -> dict[str, float]:
    """Median milliseconds of each, in turns; the first two rounds are warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, run in runs.items():
            milliseconds = time_cuda(run, calls) if device == "cuda" else time_cpu(run, calls)
            if turn >= 2:
                times[name].append(milliseconds)
    return {name: statistics.median(values) for name, values in times.items()}


def time_cpu(run: Callable[[], object], calls: int) -> float:
    """Milliseconds per call."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) * 1e3 / calls


def time_cuda(run: Callable[[], object], calls: int) -> float:
    """Milliseconds per call on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def measure(
    shape: Shape, valid: float | None, dtype: torch.dtype, device: str, kernel: str, rounds: int
) -> Row:
    """Time one share of valid text; None: no mask at all."""
    sizes = (shape.batch, shape.length, shape.heads, shape.head_dim)
    q, k, v = torch.randn(3, *sizes, device=device, dtype=dtype)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    mask = None if valid is None else gap_mask(shape, valid, device)

    def plan() -> object:
        return plan_packing(mask, batch=shape.batch, q_len=shape.length, k_len=shape.length)

    planned = plan()
    packed = planned if planned.route == "packed" else whole_batch(shape, device)
    lengths = (packed.cu_seqlens_q, packed.cu_seqlens_k, packed.max_seqlen_q, packed.max_seqlen_k)
    packed_qkv = packed.pack(q, k, v)
    times = median_times(
        {
            "default": lambda: F.scaled_dot_product_attention(*heads_first, attn_mask=mask),
            "ours": lambda: attention(q, k, v, planned, kernel=kernel),
            "kernel": lambda: flash_attn_varlen_func(*packed_qkv, *lengths, kernel=kernel),
            "plan": plan,
        },
        rounds,
        device,
    )
    pairs = shape.batch * shape.length
    needed = pairs if mask is None else mask.sum().item()
    return Row(
        str(dtype).removeprefix("torch."),
        "no mask" if valid is None else f"{valid:.0%}",
        planned.route,
        times["default"],
        times["ours"],
        times["kernel"],
        times["plan"],
        pairs / needed,
    )


def whole_batch(shape: Shape, device: str) -> PackingPlan:
    """All rows of all samples, end to end."""
    ends = torch.arange(shape.batch + 1, dtype=torch.int32, device=device) * shape.length
    every = torch.arange(shape.batch * shape.length, device=device)
    lengths = (shape.batch, shape.length, shape.length)
    return PackingPlan("packed", *lengths, None, ends, ends, *lengths[1:], None, every)


def nothing(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float
) -> torch.Tensor:
    """A kernel that takes no time: what is left is the way to it and back."""
    return q


def measure_overhead(device: str, rounds: int) -> float:
    """Microseconds that a switched layer takes more per call, kernels aside.

    A layer on a kernel that does nothing, against the layer on its default attention less what that
    takes by itself; the tensors are so small that nothing but Python takes time.
    """
    layer = Attention(16, heads=2, dim_head=8).eval().to(device)
    switched = Attention(16, heads=2, dim_head=8).eval().to(device)
    enable_fa3(switched, kernel=nothing, fallback="error")
    x = torch.randn(1, 8, 16, device=device)
    q = torch.randn(1, 2, 8, 8, device=device)
    runs = {
        "default": lambda: layer(x),
        "sdpa": lambda: F.scaled_dot_product_attention(q, q, q),
        "ours": lambda: switched(x),
    }
    times = median_times(runs, rounds, "cpu", calls=500)
    return (times["ours"] - (times["default"] - times["sdpa"])) * 1e3


def table_of(rows: list[Row], title: str) -> Table:
    """The rows for a terminal."""
    table = Table(title=title)
    for name in COLUMNS:
        table.add_column(name, justify="right" if name not in ("dtype", "route") else "left")
    for row in rows:
        table.add_row(*cells(row))
    return table


def cells(row: Row) -> tuple[str, ...]:
    """A row in words."""
    return (
        row.dtype,
        row.valid,
        row.route,
        f"{row.default_ms:.2f} ms",
        f"{row.ours_ms:.2f} ms",
        f"{row.kernel_ms:.2f} ms",
        f"{row.plan_ms:.2f} ms",
        f"{row.speedup:.2f}x",
        f"{row.of_ideal:.2f} of {row.ideal:.2f}x",
    )


def markdown_of(rows: list[Row]) -> str:
    """The rows for the README."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *map(cells, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kernel", default="auto", help="a name from available_kernels()")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=Shape.batch)
    parser.add_argument("--text", type=int, default=Shape.text)
    parser.add_argument("--image", type=int, default=Shape.image)
    parser.add_argument("--heads", type=int, default=Shape.heads)
    parser.add_argument("--head-dim", type=int, default=Shape.head_dim)
    parser.add_argument("--json", help="also write the numbers to this file")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = parse_args()
    shape = Shape(args.batch, args.text, args.image, args.heads, args.head_dim)
    cases = [(getattr(torch, name), valid) for name in args.dtype for valid in (None, *VALID)]
    with torch.inference_mode():
        rows = [
            measure(shape, valid, dtype, args.device, args.kernel, args.rounds)
            for dtype, valid in track(cases, description="measuring")
        ]
        overhead = measure_overhead(args.device, args.rounds)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    where = f"{machine}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    if args.markdown:
        print(markdown_of(rows))
    else:
        Console().print(table_of(rows, f"{shape} on {where}"))
    print(f"a switched layer takes {overhead:.1f} us more per call, kernels aside")
    if args.json:
        with open(args.json, "w") as file:
            derived = ("speedup", "of_ideal", "of_kernel")
            results = [asdict(r) | {name: getattr(r, name) for name in derived} for r in rows]
            json.dump({"where": where, "rows": results, "overhead_us": overhead}, file, indent=1)


if __name__ == "__main__":
    main()
