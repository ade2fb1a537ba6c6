r"""Draw with a pipeline whose transformer is split over several processes, and compare with one.

    torchrun --nproc-per-node 2 examples/several_gpus.py
    torchrun --nproc-per-node 4 examples/several_gpus.py --device cuda --model Qwen/Qwen-Image \
        --prompt "a cat" --prompt "a bookshop in the rain, its name above the door" --anything

The first line needs no GPU: it draws the digits of `examples/digits` on two CPU processes. Every
process draws the pictures twice, alone on the default attention and then together on FA3. With
`--device cuda`, the digits were run on two H200, with FlashAttention-3 in bfloat16. Other models,
as in the second line, were not run yet.

Exit status: 0 if FA3 served every call, with the pictures of one process; 1 if not; 2 if it cannot
start.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import text_to_image
import torch
import torch.distributed as dist
from arguments import make_parser, parse
from comparison import largest, stop, write_grid
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from digits_task import MODEL_DIR, draw
from loading import load_pipeline
from rich.console import Console
from splitting import split_tokens
from torch import nn

from diffusers_fa3 import FA3Error, coverage, cp_plan, enable_fa3
from diffusers_fa3.parallel.exchange import sent

# 6 to 8 tokens of text, beside the 16 of a picture: 2, 4 and 8 processes can share them, and the
# text has padding.
PROMPTS = ("seven", "a three", "the digit nine", "a handwritten six")
ALLOWED = 1e-5  # the largest difference of a pixel, in float32


class CannotStart(Exception):
    """Why the program cannot start, in words for its user."""


def degrees(ulysses: int | None, ring: int | None, ranks: int, heads: int | None) -> dict[str, int]:
    """Choose how many ranks trade tokens for heads, and how many gather keys.

    What is left open is filled up to the number of ranks. Without a word: Ulysses, where the heads
    can be shared out; else a ring.
    """
    if ulysses is None and ring is None:
        ulysses, ring = (ranks, 1) if heads and heads % ranks == 0 else (1, ranks)
    ulysses = ulysses or ranks // (ring or 1)
    ring = ring or ranks // ulysses
    if ulysses * ring != ranks:
        raise CannotStart(
            f"--ulysses {ulysses} times --ring {ring} must be the number of processes, {ranks}"
        )
    return {"ulysses_degree": ulysses, "ring_degree": ring}


def split(model: nn.Module, args: argparse.Namespace) -> dict[str, int]:
    """Split a model's tokens over all ranks, by the plan of this package; return the degrees."""
    heads = getattr(model.config, "num_attention_heads", None)
    chosen = degrees(args.ulysses, args.ring, dist.get_world_size(), heads)
    if args.anything and min(chosen.values()) > 1:
        raise CannotStart("--anything goes with one of --ulysses and --ring, not with both")
    anything = "ulysses_anything" if chosen["ring_degree"] == 1 else "ring_anything"
    uneven = {anything: True} if args.anything else {}
    split_tokens(model, cp_plan(model), **chosen, **uneven)
    return chosen


def pictures(pipe: DiffusionPipeline, args: argparse.Namespace) -> np.ndarray:
    """Draw the prompts: (B, H, W, 3) pixels in [0, 1]. The noise is the same on every rank."""
    if args.model == MODEL_DIR:
        seeds = range(args.seed, args.seed + len(args.prompt))
        return draw(pipe, args.prompt, seeds=seeds, steps=args.steps)
    return text_to_image.draw(pipe, args)


def run(args: argparse.Namespace) -> int:
    """Draw alone, split, draw together, and report; on every rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    console = Console(quiet=rank > 0)
    if rank > 0:
        logging.set_verbosity_error()
    device = args.device if args.device == "cpu" else f"cuda:{local_rank()}"
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    pipe = load_pipeline(args.model, device, dtype)
    pipe.set_progress_bar_config(disable=True)
    alone = pictures(pipe, args)

    enable_fa3(pipe, kernel=args.kernel, fallback="silent")  # the coverage tells
    for name, model in pipe.components.items():
        if isinstance(model, nn.Module) and name.startswith(("transformer", "unet", "prior")):
            chosen = split(model, args)
            console.print(f"{type(model).__name__} split over {ranks} ranks: {words(chosen)}")
    together = pictures(pipe, args)
    of_ranks: list[int] = [0] * ranks
    dist.all_gather_object(of_ranks, sum(n for what, n in sent.items() if what.endswith("bytes")))

    difference = largest(together, alone)
    report = coverage(pipe)
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)
    console.print(f"pixels, {ranks} ranks - one process: largest difference {difference:.1e}")
    for number, count in enumerate(of_ranks):
        console.print(f"sent by rank {number}: {count:,} bytes", highlight=False)
    if rank == 0:
        zoom = max(1, text_to_image.SMALLEST // alone.shape[2])
        write_grid(args.out, args.prompt, alone, together, zoom=zoom)
        console.print(f"one process | {ranks} ranks | difference: {args.out}", soft_wrap=True)

    close = difference <= ALLOWED or dtype != torch.float32  # bfloat16 is not judged here
    if report.fallbacks:
        console.print("FAILED: the default attention served some calls, for the reasons above")
    if not close:
        console.print(f"FAILED: a pixel is further than {ALLOWED} from that of one process")
    return 0 if close and not report.fallbacks else 1


def words(chosen: dict[str, int]) -> str:
    return ", ".join(f"{name}={degree}" for name, degree in chosen.items() if degree > 1)


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def say_once(reason: object) -> int:
    """As `stop`, but of the ranks with one reason, only the first says it.

    That need not be rank 0: torchrun ends all ranks when one has ended. The ranks meet in the store
    of torchrun; without one, each rank says its reason.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        with suppress(RuntimeError):  # the store is gone
            store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=5))
            if store.add(f"several_gpus.py: {reason}", 1) > 1:
                return 2
    return stop(reason)


def check(args: argparse.Namespace) -> None:
    """Raise what this program cannot start with."""
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        raise CannotStart(
            "this program runs on several processes; start it by "
            "`torchrun --nproc-per-node 2 examples/several_gpus.py`"
        )
    if int(os.environ["WORLD_SIZE"]) < 2:
        raise CannotStart("one process has nothing to split; give torchrun --nproc-per-node 2")
    here, devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if args.device == "cuda" and max(here, local_rank() + 1) > devices:  # on all ranks alike
        raise CannotStart(f"there are {devices} CUDA devices here; start one process for each")


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, PROMPTS, untested="models other than the digits")
    parser.add_argument("--seed", type=int, default=4, help="of the first picture")
    parser.add_argument("--ulysses", type=int, metavar="N", help="ranks that share out the heads")
    parser.add_argument("--ring", type=int, metavar="N", help="ranks that gather all keys")
    parser.add_argument(
        "--anything", action="store_true", help="take any number of tokens, and of heads"
    )
    parser.add_argument("--kernel", default="auto", help="a name from `available_kernels()`")
    parser.add_argument("--out", type=Path, default=Path("several_gpus.png"))
    return parse(parser, PROMPTS)


def main() -> int:
    args = parse_args()
    try:
        check(args)
    except CannotStart as reason:
        return say_once(reason)
    if args.device == "cuda":
        torch.cuda.set_device(local_rank())
    else:
        torch.set_num_threads(1)  # so small a model waits for a second thread longer than it saves
    # "cpu:", since with --anything diffusers gathers sizes on the CPU only if the name says so.
    dist.init_process_group("nccl" if args.device == "cuda" else "cpu:gloo")
    try:
        return run(args)
    except (CannotStart, FA3Error, OSError, ValueError) as error:  # OSError: no such model
        return say_once(error)
    except AssertionError as error:  # diffusers': tokens that ranks cannot share alike
        return say_once(f"{error}; --anything takes any number")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
