"""Draw handwritten digits from prompts, on the default attention and on FA3, and compare.

    python examples/quickstart.py
    python examples/quickstart.py --device cuda --prompts "seven" "a picture of the digit three"

The pipeline lies in `examples/digits` and is small, but real: a stock `QwenImagePipeline`, trained
by `examples/train_digits.py`. Its prompts differ in length, so a batch of them needs a mask, with a
gap in the middle: every layer attends over [text, padding, picture].

Exit status: 0 if FA3 served every call within the error budget, 1 if not, 2 if it cannot start.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from comparison import compare, largest, relative, stop, time_table, write_grid
from diffusers import DiffusionPipeline
from digits_task import MODEL_DIR, SAMPLING_STEPS, draw
from loading import load_pipeline
from rich.console import Console
from rich.table import Table
from torch import nn

from diffusers_fa3 import FA3Error

PROMPTS = (
    "seven",
    "a picture of the digit three",
    "the number 4",
    "a small picture of a handwritten 8",
    "please draw the digit two by hand, in white on a black background",
)
ROUNDS = 5
ZOOM = 5
FACTOR, FLOOR = 2, torch.finfo(torch.float32).eps  # of the error budget; pixels are float32


@dataclass(frozen=True)
class Digits:
    """What one run draws: (B, tokens, channels) latents and (B, 32, 32, 3) pixels."""

    latents: np.ndarray
    pixels: np.ndarray


def draw_digits(pipe: DiffusionPipeline, prompts: list[str], seed: int) -> Digits:
    last: dict[str, torch.Tensor] = {}

    def keep(pipe: DiffusionPipeline, step: int, timestep: torch.Tensor, values: dict) -> dict:
        last.update(values)
        return {}

    seeds = range(seed, seed + len(prompts))
    pixels = draw(pipe, prompts, seeds=seeds, callback_on_step_end=keep)
    return Digits(last["latents"].double().cpu().numpy(), pixels)


def draw_exactly(args: argparse.Namespace, dtype: torch.dtype) -> Digits:
    """Draw with the same weights and noise in float64, on the default attention."""
    pipe = load_pipeline(MODEL_DIR, args.device, dtype)
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.text_encoder, pipe.transformer, pipe.vae):
        nn.Module.to(module, torch.float64)  # the models' own `to` logs a warning
    with warnings.catch_warnings():
        # Some norms compute in float32 whatever the weights are.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        return draw_digits(pipe, args.prompts, args.seed)


# --------------------------------------------------------------------------------------- parity


def budget(default: np.ndarray, exact: np.ndarray) -> float:
    """Return the relative error allowed: twice that of the default, plus a floor for rounding."""
    return FACTOR * relative(default, exact) + FLOOR


def within_budget(default: Digits, fa3: Digits, exact: Digits) -> bool:
    """Tell whether FA3 is about as close to the float64 result as the default attention is."""
    return all(relative(f, e) <= budget(d, e) for d, f, e in trios(default, fa3, exact))


def trios(
    default: Digits, fa3: Digits, exact: Digits
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the latents of the three, then the pixels."""
    yield default.latents, fa3.latents, exact.latents
    yield default.pixels, fa3.pixels, exact.pixels


def parity_table(default: Digits, fa3: Digits, exact: Digits) -> Table:
    three = list(trios(default, fa3, exact))
    rows = {
        "FA3 - default, largest": [largest(f, d) for d, f, _ in three],
        "FA3 - default, relative": [relative(f, d) for d, f, _ in three],
        "default - float64, relative": [relative(d, e) for d, _, e in three],
        "FA3 - float64, relative": [relative(f, e) for _, f, e in three],
        "allowed, relative": [budget(d, e) for d, _, e in three],
    }
    table = Table("parity", "latents", "pixels")
    for name, values in rows.items():
        table.add_row(name, *(f"{value:.1e}" for value in values))
    return table


# ----------------------------------------------------------------------------------------- main


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS), metavar="PROMPT")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--kernel", default="auto", help="a name from `available_kernels()`")
    parser.add_argument("--seed", type=int, default=4, help="of the first picture")
    parser.add_argument("--out", type=Path, default=Path("quickstart.png"))
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        return stop("there is no CUDA device here; leave --device out to run on the CPU")
    torch.set_num_threads(1)  # so small a model waits for a second thread longer than it saves
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    console = Console()
    pipe = load_pipeline(MODEL_DIR, args.device, dtype)
    console.print(
        f"{type(pipe).__name__} on {args.device} in {str(dtype).removeprefix('torch.')}, "
        f"prompts: {len(args.prompts)}, steps: {SAMPLING_STEPS}"
    )
    try:
        comparison = compare(
            pipe,
            lambda: draw_digits(pipe, args.prompts, args.seed),
            steps=SAMPLING_STEPS,
            kernel=args.kernel,
            rounds=ROUNDS,
        )
    except FA3Error as error:
        return stop(error)

    default, fa3, exact = comparison.default, comparison.fa3, draw_exactly(args, dtype)
    console.print(str(comparison.coverage), markup=False, highlight=False, soft_wrap=True)
    console.print(parity_table(default, fa3, exact))
    console.print(f"allowed: {FACTOR} x the default's error + {FLOOR:.1e}")
    console.print(time_table(comparison))
    write_grid(args.out, args.prompts, default.pixels, fa3.pixels, zoom=ZOOM)
    console.print(f"default | FA3 | difference: {args.out}", soft_wrap=True)

    served, close = not comparison.coverage.fallbacks, within_budget(default, fa3, exact)
    if not served:
        console.print("FAILED: the default attention served some calls, for the reasons above")
    if not close:
        console.print("FAILED: FA3 is further from float64 than allowed")
    return 0 if served and close else 1


if __name__ == "__main__":
    sys.exit(main())
