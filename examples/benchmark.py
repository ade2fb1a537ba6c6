"""Time attention as diffusers' models call it: PyTorch's, diffusers' FlashAttention-3 and ours.

    python examples/benchmark.py
    python examples/benchmark.py --device cuda --json benchmark.json --plot benchmark.png

One run, all methods in turns, and each call on other inputs than the one before, so that no method
finds its own in the cache; ratios are of medians. diffusers' methods end in the same kernel as
ours: what differs is how they pack. `bare` gets tensors that are packed already: what a call takes
longer is the packing. The ideal is what the padding leaves to compute: B * Sq * Sk over the sum of
q_i * k_i. The planning of a mask, which a model does once per forward and not once per layer, is in
`ours+plan` and in a column of its own, not in `ours`. On a GPU, several calls are queued at a time,
as a model does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace

import diffusers
import torch
from attention_cases import CASES, Case, Inputs, make_inputs, mask_bytes
from benchmark_report import Row, Timing, plot, show
from diffusers.models.attention_processor import Attention
from rich.progress import track
from rivals import Method, attempt, diffusers_on, host_syncs, methods, sdpa_backend
from torch import Tensor
from torch.nn import functional as F

from diffusers_fa3 import PackingPlan, available_kernels, enable_fa3
from diffusers_fa3.providers import PROVIDERS

WARM_UP = 3
"""Rounds that are not counted."""
QUEUED = 4
"""Calls that a GPU is given at a time, where they are short."""
WRONG_FROM = 0.02
"""Relative error from which a result is another one: half precision rounds to a fifth of that."""


def measure(
    case: Case, share: float | None, dtype: torch.dtype, device: str, kernel: str, rounds: int
) -> Row:
    """All methods on one share of valid text."""
    torch.manual_seed(0)
    rounds = min(rounds, case.most_rounds or rounds)
    calls = QUEUED if device == "cuda" and case.most_rounds is None else 1
    mask = case.mask(share, device)
    plan, packed = case.plan(mask), case.packed_plan(mask, device)
    sets = make_inputs(case, mask, packed, dtype, device)
    everything = methods(plan, packed, kernel)

    # What does each give, and how?
    found = judge(everything, sets[0], packed, device)
    taken = {name: method for name, method in everything.items() if not found[name].refused}
    backend, backend_kernel = "refused", ""
    if "default" in taken:
        backend, backend_kernel = sdpa_backend(taken["default"], sets[0], device)

    # How long does it take?
    planning = Method(lambda x: case.plan(x.mask))
    times = times_of(taken | {"plan": planning}, sets, rounds, device, calls)
    needed = case.needed_pairs(mask)
    work = 4 * needed * case.heads * case.head_dim
    for name in taken:
        ms = statistics.median(times[name])
        found[name] = replace(
            found[name], ms=ms, times_ms=tuple(times[name]), tflops=work / ms / 1e9
        )
    return Row(
        case.name,
        str(dtype).removeprefix("torch."),
        share,
        plan.route,
        backend,
        backend_kernel,
        case.pairs / needed,
        statistics.median(times["plan"]),
        rounds,
        calls,
        len(sets),
        found,
    )


def judge(
    everything: dict[str, Method], inputs: Inputs, packed: PackingPlan, device: str
) -> dict[str, Timing]:
    """Refusals, errors and host synchronisations of one call each, which warms up as well."""
    found: dict[str, Timing] = {}
    default: Tensor | None = None
    for name, method in everything.items():
        result = attempt(method, inputs)
        if isinstance(result, str):
            found[name] = Timing(refused=result)
            continue
        if name == "bare":
            result = packed.unpack(result)
        default = result if name == "default" else default
        error = None if default is None else error_of(result, default, inputs.mask)
        syncs = host_syncs(method, inputs) if device == "cuda" else None
        wrong = error is not None and not error <= WRONG_FROM
        found[name] = Timing(error=error, wrong=wrong, syncs=syncs)
    return found


def error_of(result: Tensor, default: Tensor, mask: Tensor | None) -> float:
    """Relative, of the rows that see a key: of others nothing is asked."""
    difference, size = result.float() - default.float(), default.float()
    if mask is not None:
        seeing = mask.any(-1)[:, 0, :, None, None]
        difference, size = (torch.where(seeing, x, 0) for x in (difference, size))
    return (difference.norm() / size.norm()).item()


def times_of(
    runs: dict[str, Method], sets: Sequence[object], rounds: int, device: str, calls: int
) -> dict[str, list[float]]:
    """Milliseconds per call, in turns, each call on the next inputs."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    rotated = itertools.cycle(sets)
    clock = time_cuda if device == "cuda" else time_cpu
    for turn in range(WARM_UP + rounds):
        for name, method in runs.items():
            inputs = [next(rotated) for _ in range(calls)]
            with method.around():
                milliseconds = clock(method, inputs)
            if turn >= WARM_UP:
                times[name].append(milliseconds)
    return times


def time_cpu(method: Method, inputs: list[object]) -> float:
    """Milliseconds per call."""
    start = time.perf_counter()
    for each in inputs:
        method.run(each)
    return (time.perf_counter() - start) * 1e3 / len(inputs)


def time_cuda(method: Method, inputs: list[object]) -> float:
    """Milliseconds per call on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for each in inputs:
        method.run(each)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / len(inputs)


def nothing(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
    """A kernel that takes no time: what is left is the way to it and back."""
    return q


def measure_overhead(rounds: int) -> float:
    """Microseconds that a switched layer takes more per call, kernels aside.

    A layer on a kernel that does nothing, against the layer on its default attention less what that
    takes by itself; on one core, with tensors so small that nothing but Python takes time.
    """
    layer = Attention(16, heads=2, dim_head=8).eval()
    switched = Attention(16, heads=2, dim_head=8).eval()
    enable_fa3(switched, kernel=nothing, fallback="error")
    x = torch.randn(1, 8, 16)
    q = torch.randn(1, 2, 8, 8)
    runs = {
        "default": Method(layer),
        "sdpa": Method(lambda _: F.scaled_dot_product_attention(q, q, q)),
        "ours": Method(switched),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = times_of(runs, [x], rounds, "cpu", calls=500)
    torch.set_num_threads(threads)
    times = {name: statistics.median(each) for name, each in times.items()}
    return (times["ours"] - (times["default"] - times["sdpa"])) * 1e3


def free_bytes(device: str) -> int:
    """Memory that is left on the device."""
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def versions(device: str, kernel: str) -> dict[str, str]:
    """What a number cannot be repeated without; "auto" is settled here for the whole run."""
    rows = [row for row in available_kernels(device) if kernel in ("auto", row.name)]
    used = next((row for row in rows if row.accepted), rows[0])
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "diffusers": diffusers.__version__,
        "kernel": used.name,
        "kernel_version": used.version,
    }


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    names = [case.name for case in CASES]
    devices = ["cpu", "cuda"]
    kernels = ["auto", *(provider.name for provider in PROVIDERS)]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=devices[torch.cuda.is_available()], choices=devices)
    parser.add_argument("--cases", nargs="+", choices=names, help="on a CPU: padding; else all")
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument(
        "--dtype", nargs="+", choices=dtypes, help="on a CPU: float32 bfloat16; else bfloat16"
    )
    parser.add_argument("--kernel", default="auto", choices=kernels)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the program")
    parser.add_argument("--json", help="also write the numbers to this file")
    parser.add_argument("--plot", help="also draw time against valid text into this file")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    args = parser.parse_args()
    on_cpu = args.device == "cpu"
    args.cases = args.cases or (["padding"] if on_cpu else names)
    if args.plot and not any(case.name in args.cases and len(case.shares) > 1 for case in CASES):
        parser.error("--plot needs a case with several shares of valid text")
    args.dtype = args.dtype or (["float32", "bfloat16"] if on_cpu else ["bfloat16"])
    return args


def main() -> None:
    """Measure and print."""
    args = parse_args()
    about = versions(args.device, args.kernel)
    cases = [case for case in CASES if case.name in args.cases]
    calls = [
        (case.small() if args.small else case, share, getattr(torch, name))
        for case in cases
        for name in args.dtype
        for share in case.shares
    ]
    rows, skipped = [], {}
    with torch.inference_mode(), diffusers_on(about["kernel"]):
        for case, share, dtype in track(calls, description="measuring"):
            needed, free = mask_bytes(case), free_bytes(args.device)
            if needed > free:
                skipped[case.name] = f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
                continue
            rows.append(measure(case, share, dtype, args.device, about["kernel"], args.rounds))
        overhead = measure_overhead(args.rounds)

    if args.json:
        derived = ("speedup", "of_ideal", "of_kernel")
        results = [asdict(row) | {name: getattr(row, name) for name in derived} for row in rows]
        everything = {
            "versions": about,
            "command": sys.argv[1:],
            "cases": [asdict(case) for case in {case: None for case, _, _ in calls}],
            "rows": results,
            "skipped": skipped,
            "overhead_us": overhead,
        }
        with open(args.json, "w") as file:
            json.dump(everything, file, indent=1)
    swept = {case.name: [row for row in rows if row.case == case.name] for case in cases}
    swept = {name: lot for name, lot in swept.items() if len({row.share for row in lot}) > 1}
    if args.plot:
        plot(swept, args.plot)
    show(rows, swept, args.markdown)
    for name, why in skipped.items():
        print(f"{name} skipped: {why}")
    print(", ".join(f"{name} {value}" for name, value in about.items() if value))
    print(f"a switched layer takes {overhead:.1f} us more per call, kernels aside")


if __name__ == "__main__":
    main()
