"""Run a pipeline on its default attention and on FA3, time both, and lay the pictures side by side.

Shared by `quickstart.py` and `text_to_image.py`.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from diffusers_fa3 import coverage, disable_fa3, enable_fa3

if TYPE_CHECKING:
    from diffusers_fa3.layers.coverage_report import Coverage

T = TypeVar("T")


# -------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Comparison(Generic[T]):
    """What a pipeline gave on its default attention and on FA3, and how long a step took.

    Attributes:
        default, fa3: what the last run returned.
        default_ms, fa3_ms: median time of the denoiser in a step, in milliseconds.
        coverage: which kernel served the attention calls of the last run on FA3.
    """

    default: T
    fa3: T
    default_ms: float
    fa3_ms: float
    coverage: Coverage


def compare(
    pipe: DiffusionPipeline,
    draw: Callable[[], T],
    *,
    steps: int,
    kernel: str,
    rounds: int,
) -> Comparison[T]:
    """Call `draw` on the default attention and on FA3 in turn, `rounds` times after a warm-up.

    Args:
        pipe: the pipeline that `draw` calls.
        draw: one run of the pipeline, the same at every call.
        steps: denoising steps in a run.
        kernel: for `enable_fa3`.
        rounds: runs that are timed, of each.

    Raises:
        FA3Error: `pipe` has no attention layer, or there is no such kernel.
    """
    pipe.set_progress_bar_config(disable=True)  # one bar for all runs instead
    enable_fa3(pipe, kernel=kernel)  # refuses here what it cannot do, before any work is done
    disable_fa3(pipe)
    names = ("default", "FA3") * (1 + rounds)
    results: dict[str, T] = {}
    measured: dict[str, list[float]] = {"default": [], "FA3": []}
    with progress_bar() as bar:
        task = bar.add_task("", total=None)
        for run, name in enumerate(names):
            warm_up = run < 2
            bar.update(task, description=f"{name}, warm-up" if warm_up else name)
            if name == "FA3":
                enable_fa3(pipe, kernel=kernel, fallback="silent")  # the coverage tells
            with stopwatch(pipe, partial(bar.advance, task)) as seconds:
                results[name] = draw()
            report = coverage(pipe)
            disable_fa3(pipe)
            bar.update(task, total=len(seconds) * len(names))
            if not warm_up:
                measured[name] += seconds
    calls_per_step = len(seconds) / steps  # two where guidance is a call of its own
    default_ms, fa3_ms = (
        1000 * calls_per_step * statistics.median(values) for values in measured.values()
    )
    return Comparison(results["default"], results["FA3"], default_ms, fa3_ms, report)


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )


@contextmanager
def stopwatch(pipe: DiffusionPipeline, on_call: Callable[[], None]) -> Iterator[list[float]]:
    """Collect the seconds that each call of a denoiser takes, the device's work included."""
    seconds: list[float] = []

    def start(module: nn.Module, args: tuple[object, ...]) -> None:
        synchronize(pipe.device)
        seconds.append(-time.perf_counter())

    def stop(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        synchronize(pipe.device)
        seconds[-1] += time.perf_counter()
        on_call()

    hooks = []
    for name, module in pipe.components.items():
        if isinstance(module, nn.Module) and name.startswith(("transformer", "unet", "prior")):
            hooks += [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------------ reporting


def stop(reason: object) -> int:
    """Say why a program cannot go on, and return its exit status."""
    print(f"error: {reason}", file=sys.stderr)
    return 2


def time_table(comparison: Comparison[object]) -> Table:
    table = Table("denoiser", "ms per step (median)")
    table.add_row("default", f"{comparison.default_ms:.2f}")
    table.add_row("FA3", f"{comparison.fa3_ms:.2f}")
    return table


def largest(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest absolute difference."""
    return float(np.abs(a.astype(np.float64) - b).max())


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """Return the norm of the difference over the norm of `b`."""
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b))


# -------------------------------------------------------------------------------------- drawing

MARGIN, HEAD, LABEL_WIDTH, TITLE_WIDTH = 12, 40, 220, 150
PAPER, INK = "white", "black"


def write_grid(
    path: Path, prompts: Sequence[str], default: np.ndarray, fa3: np.ndarray, *, zoom: int = 1
) -> None:
    """Write a PNG with a row per prompt: the default's picture, FA3's, and their difference.

    Args:
        path: the file.
        prompts: B labels.
        default: (B, H, W, 3) pixels in [0, 1].
        fa3: likewise.
        zoom: pixels of the PNG for a pixel of a picture, across and down.
    """
    difference = np.abs(fa3 - default)
    factor = amplification(difference)
    columns = {
        "default": default,
        "FA3": fa3,
        f"difference x {factor:,}" if difference.any() else "no difference": difference * factor,
    }
    font = ImageFont.load_default(size=14)
    height, width = (zoom * size for size in default.shape[1:3])
    row, column = height + MARGIN, max(width, TITLE_WIDTH) + MARGIN
    sheet = Image.new("RGB", (LABEL_WIDTH + 3 * column, HEAD + len(prompts) * row), PAPER)
    pen = ImageDraw.Draw(sheet)
    for x, (title, pictures) in enumerate(columns.items()):
        left = LABEL_WIDTH + x * column
        pen.text((left, MARGIN), title, INK, font)
        for y, pixels in enumerate(pictures):
            picture = Image.fromarray((255 * pixels.clip(0, 1)).round().astype(np.uint8))
            sheet.paste(picture.resize((width, height), Image.NEAREST), (left, HEAD + y * row))
    for y, prompt in enumerate(prompts):
        lines = wrap(prompt, font, LABEL_WIDTH - 2 * MARGIN)
        pen.multiline_text((MARGIN, HEAD + y * row), lines, INK, font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def amplification(difference: np.ndarray) -> int:
    """Return the power of ten that makes the largest difference visible, but not more than white.

    Returns 1 for no difference at all.
    """
    peak = float(difference.max())
    return 10 ** max(0, math.floor(-math.log10(peak))) if peak > 0 else 1


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Break `text` into lines of at most `width` pixels, between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines).strip()
