r"""Draw prompts of different lengths in one batch, and each alone: the pictures are the same.

    python examples/padded_batch.py
    python examples/padded_batch.py --no-mask
    python examples/padded_batch.py --model Qwen/Qwen-Image --device cuda \
        --prompt "a cat" --prompt "a bookshop in the rain, its name above the door"

A batch pads all prompts to the longest one, and a mask hides the padding. With `--no-mask` the
transformer gets no mask: every prompt but the longest then gives another picture, and the program
must fail.

The first two lines draw the digits of `examples/digits` on a CPU. The third was not run yet.

Exit status: 0 if FA3 served every call, and each prompt gave in the batch what it gives alone; 1 if
not; 2 if the program cannot start.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
from arguments import make_parser, parse
from comparison import largest, stop
from diffusers import DiffusionPipeline
from loading import load_pipeline
from rich.console import Console
from rich.table import Table
from several_gpus import pictures
from torch import nn

from diffusers_fa3 import FA3Error, coverage, disable_fa3, enable_fa3

PROMPTS = (
    "seven",
    "a picture of the digit three",
    "please draw the digit two by hand, in white on a black background",
)
FACTOR, FLOOR = 2, 1e-5
"""Of the difference allowed. Sums over a batch are made in another order than over one sample. So
the default attention, which hides the padding too, does not give equal pictures either: allowed is
twice the largest of its differences. The floor is for a default that gives equal ones. It is far
below 1/256, the step between two levels of a pixel, and far above float32's rounding, some 1e-7."""


def together_and_alone(
    pipe: DiffusionPipeline, args: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray]:
    """Draw all prompts in one batch, and one by one, each from the same noise.

    Returns:
        (B, H, W, 3) pixels in [0, 1] of the batch, and likewise of the single prompts.
    """
    ones = [
        argparse.Namespace(**vars(args) | {"prompt": [prompt], "seed": args.seed + i})
        for i, prompt in enumerate(args.prompt)
    ]
    return pictures(pipe, args), np.concatenate([pictures(pipe, one) for one in ones])


def without_mask(module: nn.Module, args: tuple[()], kwargs: dict[str, object]) -> object:
    """Take the mask of the text from the arguments of a forward, whatever the model calls it."""
    masks = ("encoder_hidden_states_mask", "encoder_attention_mask")
    return args, {name: None if name in masks else value for name, value in kwargs.items()}


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, PROMPTS)
    parser.add_argument("--no-mask", action="store_true", help="see the program fail")
    parser.add_argument("--kernel", default="auto", help="a name from `available_kernels()`")
    return parse(parser, PROMPTS)


def main() -> int:
    args = parse_args()
    if len(args.prompt) < 2:
        return stop("one prompt makes no batch; give --prompt twice or more often")
    if args.device == "cuda" and not torch.cuda.is_available():
        return stop("there is no CUDA device here; leave --device out to run on the CPU")
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    try:
        pipe = load_pipeline(args.model, args.device, dtype)
        pipe.set_progress_bar_config(disable=True)
        enable_fa3(pipe, kernel=args.kernel)  # refuses here what it cannot do
        disable_fa3(pipe)
        default, default_alone = together_and_alone(pipe, args)
        enable_fa3(pipe, kernel=args.kernel, fallback="silent")  # the coverage tells
        if args.no_mask:
            denoiser = pipe.components.get("transformer") or pipe.unet
            denoiser.register_forward_pre_hook(without_mask, with_kwargs=True)
        ours, ours_alone = together_and_alone(pipe, args)
    except (FA3Error, OSError, ValueError) as error:  # OSError, ValueError: no such model
        return stop(error)

    by_default = [largest(*pair) for pair in zip(default, default_alone)]
    by_ours = [largest(*pair) for pair in zip(ours, ours_alone)]
    ceiling = 1 / 256 if dtype == torch.float32 else 1.0  # for a release that hides no padding
    allowed = min(FACTOR * max(by_default) + FLOOR, ceiling)
    report, console = coverage(pipe), Console()
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)
    table = Table("batch - alone, largest of a pixel", "default", "FA3")
    for prompt, theirs, mine in zip(args.prompt, by_default, by_ours):
        table.add_row(prompt, f"{theirs:.1e}", f"{mine:.1e}")
    console.print(table)
    console.print(f"allowed: {allowed:.1e}; {FACTOR} x the default + {FLOOR}, up to {ceiling:.1e}")
    if report.fallbacks:
        console.print("FAILED: the default attention served some calls, for the reasons above")
    if max(by_ours) > allowed:
        console.print("FAILED: a prompt gives another picture in the batch than alone")
    return 1 if report.fallbacks or max(by_ours) > allowed else 0


if __name__ == "__main__":
    sys.exit(main())
