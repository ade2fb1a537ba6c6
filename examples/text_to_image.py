r"""Run any diffusers text-to-image pipeline on its default attention and on FA3, and compare.

    python examples/text_to_image.py --model Qwen/Qwen-Image --device cuda \
        --prompt "a cat" --prompt "a bookshop in the rain, its name above the door" --steps 20

Both runs start from the same seeds. Prompts of different lengths in one batch need a mask.

Exit status: 0 if both runs came through, 2 if not, with the reason.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from pathlib import Path

import numpy as np
import torch
from comparison import compare, largest, relative, stop, time_table, write_grid
from diffusers import DiffusionPipeline
from loading import load_pipeline
from rich.console import Console

from diffusers_fa3 import FA3Error

ROUNDS = 1  # timed runs of each attention, after a warm-up
SMALLEST = 128  # pixels across; smaller pictures are enlarged in the PNG


def draw(pipe: DiffusionPipeline, args: argparse.Namespace) -> np.ndarray:
    """Draw one picture per prompt, each from its own seed.

    Returns:
        (B, H, W, 3) pixels in [0, 1].

    Raises:
        ValueError: `pipe` gives no pictures, or refuses its arguments.
    """
    known = inspect.signature(pipe.__call__).parameters
    if not {"num_frames", "frames"}.isdisjoint(known):
        raise ValueError(no_pictures(pipe, "frames"))
    size = {} if args.size is None else {"height": args.size, "width": args.size}
    if size and "use_resolution_binning" in known:
        size["use_resolution_binning"] = False  # else the pipeline picks another size nearby
    try:
        drawn = pipe(
            args.prompt,
            generator=[
                torch.Generator().manual_seed(args.seed + i) for i in range(len(args.prompt))
            ],
            num_inference_steps=args.steps,
            output_type="np",
            **size,
        )
    except ValueError as error:
        if re.search("size|height|width", str(error)):
            raise ValueError(f"{error}; give another height and width with --size") from error
        raise
    for name in ("images", "image"):  # Kandinsky 5 has the singular
        if name in drawn:
            return drawn[name]
    raise ValueError(no_pictures(pipe, ", ".join(drawn)))


def no_pictures(pipe: DiffusionPipeline, given: str) -> str:
    return (
        f"this program draws pictures; got a {type(pipe).__name__}, which gives {given}; "
        "`diffusers-fa3 check` takes it"
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="name on the Hugging Face hub, or a folder")
    parser.add_argument("--prompt", required=True, action="append", help="give it once per picture")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, help="height and width; default: the pipeline's own")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="default: bfloat16 on a GPU, which every FA3 kernel takes; float32 on a CPU",
    )
    parser.add_argument("--kernel", default="auto", help="a name from `available_kernels()`")
    parser.add_argument("--out", type=Path, default=Path("text_to_image.png"))
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        return stop("there is no CUDA device here; leave --device out to run on the CPU")
    dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    console = Console()
    try:
        pipe = load_pipeline(args.model, args.device, getattr(torch, dtype))
    except (OSError, ValueError) as error:  # no such folder, name or network
        return stop(error)
    console.print(
        f"{type(pipe).__name__} on {args.device} in {dtype}, "
        f"prompts: {len(args.prompt)}, steps: {args.steps}"
    )
    try:
        comparison = compare(
            pipe, lambda: draw(pipe, args), steps=args.steps, kernel=args.kernel, rounds=ROUNDS
        )
    except (FA3Error, ValueError) as error:  # ValueError: of `draw`
        return stop(error)

    default, fa3 = comparison.default, comparison.fa3
    console.print(str(comparison.coverage), markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"pixels, FA3 - default: largest {largest(fa3, default):.1e}, "
        f"relative {relative(fa3, default):.1e}"
    )
    console.print(time_table(comparison))
    zoom = max(1, SMALLEST // default.shape[2])
    write_grid(args.out, args.prompt, default, fa3, zoom=zoom)
    console.print(f"default | FA3 | difference: {args.out}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
