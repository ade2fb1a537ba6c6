"""The command `diffusers-fa3 bench`: its options, and what they ask for."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from diffusers_fa3.errors import InputError
from diffusers_fa3.kernels import check_choice
from diffusers_fa3.tools.shared_arguments import KERNELS, add_device, positive

if TYPE_CHECKING:
    from diffusers_fa3.tools.bench.cases import Case
    from diffusers_fa3.tools.bench.run import Results

BENCH = """\
Time the attention calls of diffusers' models on PyTorch's attention, on diffusers' FlashAttention-3
methods and on this package ("ours"), in one run.

  diffusers-fa3 bench
  diffusers-fa3 bench --model QwenImage --batch 4 --valid none,0.1,1.0 --dtype bf16
  diffusers-fa3 bench --heads 8 --head-dim 64 --text 512 --image 1024 --json out.json --plot out.png
  diffusers-fa3 bench --model scale --lengths 256,1024,4096 --plot scale.png

The methods take turns, and each call gets different inputs than the call before, so that no method
finds its inputs in the cache. Times are medians. diffusers' methods run the same kernel as ours, so
they differ only in how they pack. "bare" gets tensors that are packed already; the extra time of
"ours" is the packing. "ours+q" leaves padded tokens out as queries too. The ideal is the speedup if
padding cost nothing. A model plans a mask once per forward, not in every layer, so "ours" does not
include planning; "ours+plan" includes it, and the column "plan" shows it alone. On a GPU, several
calls are queued at a time, as in a model.
"""

DTYPES = {
    name: dtype
    for dtype, names in {
        torch.float32: ("fp32", "float32"),
        torch.bfloat16: ("bf16", "bfloat16"),
        torch.float16: ("fp16", "float16"),
    }.items()
    for name in names
}

T = TypeVar("T")


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of `diffusers-fa3`."""
    bench = commands.add_parser(
        "bench",
        help="time attention calls in all ways there are",
        description=BENCH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.set_defaults(run=_bench)
    calls = bench.add_argument_group("calls")
    calls.add_argument(
        "--model",
        nargs="+",
        metavar="NAME",
        help="whose calls: flux, qwenimage, wan, ... or a class of diffusers, or all; without one, "
        "your own sizes, or four samples of 512 + 1024 tokens (on a GPU: all)",
    )
    for option, what in {
        "batch": "samples",
        "text": "text tokens of each",
        "image": "image tokens of each",
        "heads": "heads of q",
        "kv-heads": "heads of k and v, before they are repeated for every head of q",
        "head-dim": "head size",
    }.items():
        calls.add_argument(f"--{option}", type=positive, metavar="N", help=what)
    calls.add_argument(
        "--padding",
        choices=("gap", "end", "outer"),
        help="where padding lies: between text and image, at the end, or at the end with padded "
        "rows masked too",
    )
    calls.add_argument(
        "--valid",
        type=_list_of(_share),
        metavar="SHARES",
        help='of the text that is valid, e.g. none,0.1,1.0; "none" is a call without a mask',
    )
    calls.add_argument(
        "--lengths",
        type=_list_of(positive),
        metavar="TOKENS",
        help="of text and image together, in the proportion of the call: e.g. 256,1024,4096",
    )
    calls.add_argument("--small", action="store_true", help="tiny sizes, to try the program")
    how = bench.add_argument_group("how")
    how.add_argument("--dtype", type=_list_of(_dtype), help="bf16, fp16, fp32; on a CPU fp32,bf16")
    add_device(how)
    how.add_argument("--kernel", default="auto", choices=KERNELS)
    how.add_argument("--rounds", type=positive, default=15, metavar="N")
    output = bench.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
    output.add_argument("--plot", metavar="FILE", help="also draw time along what is swept")
    output.add_argument("--markdown", action="store_true", help="print the tables as Markdown")


def _bench(args: argparse.Namespace) -> None:
    from diffusers_fa3.tools.bench.run import run
    from diffusers_fa3.tools.bench.tables import show

    check_choice(args.kernel)
    cases = _cases(args)
    sweeps = [args.lengths or [], *([x for x in case.shares if x is not None] for case in cases)]
    if args.plot and max(map(len, sweeps)) < 3:
        raise InputError("--plot draws a sweep: give three or more --valid, or as many --lengths")
    for option, file in {"--json": args.json, "--plot": args.plot}.items():
        if file:
            _refuse_unwritable(option, Path(file))
    if args.plot:
        from diffusers_fa3.tools.bench.plot import check_format, plot

        check_format(Path(args.plot))
    usual = {"cpu": [torch.float32, torch.bfloat16], "cuda": [torch.bfloat16]}
    dtypes = args.dtype or usual[args.device]
    results = run(cases, dtypes, args.device, args.kernel, args.rounds)
    show(results.rows, args.markdown)
    for name, why in results.skipped.items():
        print(f"{name} skipped: {why}")
    print(", ".join(f"{name} {value}" for name, value in results.versions.items() if value))
    print(
        f"a switched layer takes more per call, kernels aside: {_overhead_of(results)}", flush=True
    )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(_as_json(results, cases), file, indent=1)
    if args.plot:
        plot(results.rows, args.plot)


def _refuse_unwritable(option: str, file: Path) -> None:
    """An error before anything is measured, not after it."""
    if file.is_dir() or not file.parent.is_dir():
        problem = str(file)
    elif not os.access(file if file.exists() else file.parent, os.W_OK):
        problem = f"{file}, which cannot be written"
    else:
        return
    raise InputError(
        f"--json and --plot write into a folder that exists; got {option} {problem}. Give a file "
        "in a folder of your own"
    )


def _overhead_of(results: Results) -> str:
    if results.overhead_us <= results.overhead_noise_us:
        return "within the noise"
    return f"{results.overhead_us:.1f} us"


def _cases(args: argparse.Namespace) -> list[Case]:
    """The cases that the options ask for."""
    from diffusers_fa3.tools.bench.cases import CASES, SHARES, Case, cases_of

    sizes = ("batch", "text", "image", "heads", "kv_heads", "head_dim")
    given: dict[str, Any] = {n: getattr(args, n) for n in sizes if getattr(args, n) is not None}
    if args.padding:
        given |= {"gap": args.padding == "gap", "outer": args.padding == "outer"}
    if args.model == ["all"] or (not args.model and not given and args.device == "cuda"):
        found = list(CASES)
    elif args.model:
        found = [case for model in args.model for case in cases_of(model)]
    elif given:
        found = [Case("yours", 1, 512, 4096, heads=24, head_dim=128, shares=SHARES, gap=True)]
    else:
        found = [CASES[0]]
    found = [replace(case, **given) for case in found]
    if args.valid:
        found = [replace(case, shares=tuple(args.valid)) for case in found]
    if args.small:
        found = [case.small() for case in found]
    if args.lengths:
        found = [case.of_length(tokens) for case in found for tokens in args.lengths]
    return found


def _as_json(results: Results, cases: Sequence[Case]) -> dict[str, Any]:
    derived = ("speedup", "speedup_q", "of_ideal", "of_ideal_q", "of_kernel")
    rows = [asdict(row) | {name: getattr(row, name) for name in derived} for row in results.rows]
    return {
        "versions": results.versions,
        "command": sys.argv[1:],
        "cases": [asdict(case) for case in cases],
        "rows": rows,
        "skipped": results.skipped,
        "overhead_us": results.overhead_us,
        "overhead_noise_us": results.overhead_noise_us,
    }


def _list_of(read: Callable[[str], T]) -> Callable[[str], list[T]]:
    def read_all(text: str) -> list[T]:
        return [read(part) for part in text.split(",")]

    return read_all


def _share(text: str) -> float | None:
    if text == "none":
        return None
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"none, or a share above 0 and up to 1; got {text}")
    return share


def _dtype(text: str) -> torch.dtype:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"one of {', '.join(DTYPES)}; got {text}")
    return DTYPES[text]
