r"""Compile a switched transformer into one graph, and compare it with the same one in eager mode.

    python examples/compile.py
    python examples/compile.py --model Qwen/Qwen-Image --device cuda --prompt "a cat" \
        --prompt "a bookshop in the rain, its name above the door"

A graph reads nothing from a mask. So a call whose mask is bool or int, with one row per sample,
goes on route `static`: keys are reordered on the device, and lengths stay there. In eager mode the
same call is `packed`, or `seqused`. Calls in graphs are counted per model, in the coverage's row
`compiled graphs`; the layers' own rows stay empty.

The first line draws the digits of `examples/digits` on a CPU. It needs no C++ compiler: the backend
"aot_eager" makes graphs, but generates no code. On a GPU the backend is torch's usual, "inductor".
The second command was not run yet.

Exit status: 0 if the graph served every call, with the pictures of eager mode; 1 if not; 2 if the
program cannot start.
"""

from __future__ import annotations

import argparse
import sys

import torch
from arguments import make_parser, parse
from comparison import largest, stop
from loading import load_pipeline
from several_gpus import pictures
from torch._dynamo.utils import counters

from diffusers_fa3 import FA3Error, coverage, enable_fa3

PROMPTS = ("seven", "a picture of the digit three")
ALLOWED = 1e-3
"""The largest difference of a pixel in float32: a quarter of a step from one of 256 levels to the
next. Graphs order sums in another way; on the digits that makes some 1e-7."""
EXPECTED = "expected where a model's mask is additive: docs/limits.md#torchcompile-and-cuda-graphs"


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, PROMPTS)
    parser.add_argument("--backend", help="of torch.compile; default: aot_eager, on a GPU inductor")
    parser.add_argument("--kernel", default="auto", help="a name from `available_kernels()`")
    args = parse(parser, PROMPTS)
    args.backend = args.backend or ("inductor" if args.device == "cuda" else "aot_eager")
    return args


def main() -> int:
    args = parse_args()
    if args.backend not in torch.compiler.list_backends(exclude_tags=()):
        return stop(f"torch.compile has no backend {args.backend!r}; take aot_eager or inductor")
    if args.device == "cuda" and not torch.cuda.is_available():
        return stop("there is no CUDA device here; leave --device out to run on the CPU")
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    try:
        pipe = load_pipeline(args.model, args.device, dtype)
        pipe.set_progress_bar_config(disable=True)
        # First switch, then compile. A call that no kernel serves is an error, not a fallback.
        enable_fa3(pipe, kernel=args.kernel, fallback="error")
        eager = pictures(pipe, args)
        print(f"eager mode\n{coverage(pipe)}\n")

        enable_fa3(pipe, kernel=args.kernel, fallback="silent")  # counts anew; the coverage tells
        name = "transformer" if "transformer" in pipe.components else "unet"
        denoiser = getattr(pipe, name)
        setattr(pipe, name, torch.compile(denoiser, backend=args.backend, fullgraph=True))
        compiled = pictures(pipe, args)
    except (FA3Error, OSError, ValueError) as error:  # OSError, ValueError: no such model
        return stop(error)

    report, difference = coverage(pipe), largest(compiled, eager)
    print(f"torch.compile, backend {args.backend}\n{report}\n")
    print(f"steps: {args.steps}, graphs compiled: {counters['stats']['unique_graphs']}")
    print(f"pixels, compiled - eager: largest difference {difference:.1e}")
    # bfloat16 is not judged: there, rounding alone moves edges in a picture.
    close = difference <= ALLOWED or dtype != torch.float32
    served = report.calls > 0 and not report.fallbacks
    if not served:
        print(
            "FAILED: calls were compiled as the default attention, for the reasons above; "
            f"{EXPECTED}"
        )
    if not close:
        print(f"FAILED: a pixel is further than {ALLOWED} from that of eager mode")
    return 0 if served and close else 1


if __name__ == "__main__":
    sys.exit(main())
