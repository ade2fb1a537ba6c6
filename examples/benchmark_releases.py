"""Whole diffusers models on two checkouts of this project, a forward of each in turns.

    git worktree add ../before SOME_COMMIT
    python examples/benchmark_releases.py ../before --models flux chroma

A package can be imported once in a process, so each checkout has one of its own. The mask is copied
in every forward, so that it is read and planned anew each time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from multiprocessing.managers import BaseManager
from pathlib import Path

import torch
from published_models import MODELS, Model, build, forward_of, made_shallow, made_small, make_inputs
from rich.console import Console
from rich.progress import track

HERE = Path(__file__).parents[1]
WARM_UP = 2
"""Forwards of each that are not counted."""


@dataclass(frozen=True)
class Cost:
    """What forwards of one checkout took."""

    ms: float
    """Median."""
    times_ms: tuple[float, ...]
    peak_gb: float | None
    """Most memory allocated, weights included; None: not on a GPU."""


@dataclass(frozen=True)
class Row:
    """A model on one share of valid text; None: no mask."""

    model: str
    share: float | None
    before: Cost
    after: Cost

    @property
    def speedup(self) -> float:
        """How many times faster it became."""
        return self.before.ms / self.after.ms


class Checkout:
    """A model on the package of one checkout, in a process of its own."""

    def __init__(self, path: Path, model: Model, device: str, kernel: str) -> None:
        sys.path.insert(0, str(path))
        package = import_module("diffusers_fa3")
        if not Path(str(package.__file__)).is_relative_to(path):
            raise RuntimeError(f"{path} has no package diffusers_fa3; {package.__file__} was found")
        self._model, self._device = model, device
        self._network = build(model, device)
        package.enable_fa3(self._network, kernel=kernel, fallback="error")

    def take(self, share: float | None) -> None:
        """From here on, this share of the text is valid."""
        self._inputs = make_inputs(self._model, share, self._device)
        self._times: list[float] = []
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    @torch.no_grad()
    def run(self) -> None:
        """One forward, until the device is done."""
        start = time.perf_counter()
        forward_of(self._network)(self._inputs)
        if self._device == "cuda":
            torch.cuda.synchronize()
        self._times.append((time.perf_counter() - start) * 1e3)

    def cost(self) -> Cost:
        """What it took so far, but for the first forwards."""
        times = self._times[WARM_UP:]
        peak = torch.cuda.max_memory_allocated() / 1e9 if self._device == "cuda" else None
        return Cost(statistics.median(times), tuple(times), peak)


class Process(BaseManager):
    """Where a checkout is at work."""


Process.register("Checkout", Checkout)


def measure(model: Model, args: argparse.Namespace) -> Iterator[Row]:
    """Both checkouts on one model, in turns; a row for every share of valid text."""
    spawn = multiprocessing.get_context("spawn")
    with Process(ctx=spawn) as one, Process(ctx=spawn) as other:
        before = one.Checkout(args.before, model, args.device, args.kernel)
        after = other.Checkout(HERE, model, args.device, args.kernel)
        for share in model.shares:
            before.take(share)
            after.take(share)
            for _ in range(WARM_UP + args.rounds):
                before.run()
                after.run()
            yield Row(model.name, share, before.cost(), after.cost())


def commit_of(path: Path) -> str:
    """Which commit a checkout is of, and whether it was edited since."""
    describe = ["git", "-C", str(path), "describe", "--always", "--dirty"]
    return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or str(path)


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| model | valid text | before | after | speedup | peak memory |", "| --- " * 6 + "|"]
    for row in rows:
        share = "no mask" if row.share is None else f"{100 * row.share:.3g}%"
        times = f"{row.before.ms:.1f} ms | {row.after.ms:.1f} ms | {row.speedup:.2f}x"
        peaks = (cost.peak_gb for cost in (row.before, row.after))
        memory = " / ".join("-" if peak is None else f"{peak:.1f} GB" for peak in peaks)
        lines.append(f"| {row.model} | {share} | {times} | {memory} |")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    names = [model.name for model in MODELS]
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("before", type=Path, help="the other checkout; this one is measured too")
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, help="at most so many blocks")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the program")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    args.before = args.before.resolve()
    if not (args.before / "diffusers_fa3").is_dir():
        parser.error(f"{args.before} has no package diffusers_fa3; give the folder of a checkout")
    return args


def main() -> None:
    """Measure and print."""
    args = parse_args()
    models = [made_small(model) if args.small else model for model in MODELS]
    wanted = [made_shallow(model, args.layers) for model in models if model.name in args.models]
    progress = track(wanted, "measuring", console=Console(stderr=True))
    rows = [row for model in progress for row in measure(model, args)]
    about = f"before: {commit_of(args.before)}, after: {commit_of(HERE)}, torch {torch.__version__}"
    print(f"{about}\n\n{table(rows)}")
    if args.json:
        everything = {"about": about, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
