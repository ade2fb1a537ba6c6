r"""Give `enable_fa3` a kernel of one's own: a function with FlashAttention's varlen arguments.

    python examples/custom_kernel.py
    python examples/custom_kernel.py --broken
    python examples/custom_kernel.py --model Qwen/Qwen-Image --device cuda --prompt "a cat"

The kernel is `my_attention` below, some lines of PyTorch, written to be read. It is compared with
the default attention twice: by itself, on random tensors with a mask, and in a pipeline. With
`--broken` it drops the last key of every sample, and the comparison must fail. A call that asks for
an argument which the function lacks, such as `causal`, is refused in words.

The first two lines draw the digits of `examples/digits` on a CPU. The third was not run yet.

Exit status: 0 if the kernel served every call with the default's result; 1 if not; 2 if the program
cannot start.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from itertools import pairwise

import torch
from arguments import make_parser, parse
from comparison import largest, stop
from loading import load_pipeline
from several_gpus import pictures
from torch import Tensor
from torch.nn import functional as F

from diffusers_fa3 import FA3Error, attention, coverage, enable_fa3

PROMPTS = ("seven", "a picture of the digit three")
ALLOWED = 1e-5
"""The largest error of the kernel by itself, on values of size 1 in float32. Rounding gives some
1e-7, and each of the few keys has a part of the result that no rounding comes near."""
ALLOWED_IN_PIXELS = 1e-3
"""In float32: a quarter of a step from one of 256 levels to the next. The digits need 1e-6."""


def my_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    dropped: int = 0,
) -> Tensor:
    """Attention of many sequences, laid end to end; each attends to its own keys alone.

    q is (Tq, H, D), k and v are (Tk, Hk, D), and padded keys are not among them; Hk divides H. The
    int32 `cu_seqlens` say where each sequence begins, and where the last one ends. `softmax_scale`
    is D ** -0.5 if None. `dropped` is no argument of FlashAttention: `--broken` leaves out so many
    keys at the end of each sequence.

    Returns:
        (Tq, H, D), as q.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    results = []
    # Reading the lengths makes the host wait for a GPU. A fast kernel reads them on the device.
    for queries, keys in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist())):
        first, last = keys[0], keys[1] - dropped
        scores = scale * torch.einsum("qhd,khd->hqk", q[slice(*queries)], k[first:last])
        weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
        results.append(torch.einsum("hqk,khd->qhd", weights.to(v.dtype), v[first:last]))
    return torch.cat(results)


def error_alone(kernel: Callable[..., Tensor], device: str) -> float:
    """The largest difference from PyTorch's attention, with padding amid the keys."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 12, 4, 32, generator=generator).to(device)  # (B, S, H, D)
    mask = torch.ones(2, 12, dtype=torch.bool, device=device)  # (B, Sk)
    mask[0, 2:7] = False
    q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
    right = F.scaled_dot_product_attention(q_, k_, v_, mask[:, None, None]).transpose(1, 2)
    return (attention(q, k, v, mask, kernel=kernel) - right).abs().max().item()


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, PROMPTS)
    parser.add_argument("--broken", action="store_true", help="drop a key: see the program fail")
    return parse(parser, PROMPTS)


def main() -> int:
    args = parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        return stop("there is no CUDA device here; leave --device out to run on the CPU")
    kernel = functools.partial(my_attention, dropped=1) if args.broken else my_attention
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    try:
        alone = error_alone(kernel, args.device)
        pipe = load_pipeline(args.model, args.device, dtype)
        pipe.set_progress_bar_config(disable=True)
        default = pictures(pipe, args)
        enable_fa3(pipe, kernel=kernel)
        ours = pictures(pipe, args)
    except (FA3Error, OSError, ValueError) as error:  # OSError, ValueError: no such model
        return stop(error)

    report, pixels = coverage(pipe), largest(ours, default)
    print(report)
    print(f"by itself, kernel - default: largest difference {alone:.1e}")
    print(f"pixels,    kernel - default: largest difference {pixels:.1e}")
    # Many steps in bfloat16 are not judged: there, rounding alone moves edges in a picture.
    close = alone <= ALLOWED and (pixels <= ALLOWED_IN_PIXELS or dtype != torch.float32)
    if report.fallbacks:
        print("FAILED: the default attention served some calls, for the reasons above")
    if not close:
        print(f"FAILED: more than {ALLOWED} by itself, or {ALLOWED_IN_PIXELS} in a pixel")
    return 0 if close and not report.fallbacks else 1


if __name__ == "__main__":
    sys.exit(main())
