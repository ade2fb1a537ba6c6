"""Time the reading of a (B, 1, S, S) mask, once per forward, against one attention call with it.

    python examples/benchmark_planning.py
    python examples/benchmark_planning.py --device cuda --dtype bfloat16 --heads 24 --head-dim 128

Reading and PyTorch's attention take turns in one run, and with `--flux-layers 57` a forward of a
Flux transformer of so many layers (random weights), switched; medians. What a mask says is in its
name, how it is written in the column beside it. `scatter` is what no variable-length kernel can
take: how long it takes to find that out.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator

import torch
from diffusers import FluxTransformer2DModel
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from diffusers_fa3 import MaskError, enable_fa3, plan_packing
from diffusers_fa3.tools.bench.methods import Method
from diffusers_fa3.tools.bench.run import versions
from diffusers_fa3.tools.bench.timing import times_of

Forward = Callable[[Tensor], Tensor]


def padding(length: int) -> Tensor:
    """A fifth of the tokens is padding, as queries and as keys."""
    valid = torch.arange(length) < length * 4 // 5
    return valid[:, None] & valid


def key_padding(length: int) -> Tensor:
    """A fifth of the keys is padding; laid out for every query."""
    return (torch.arange(length) < length * 4 // 5).repeat(length, 1)


def causal(length: int) -> Tensor:
    """A query sees keys up to itself."""
    return torch.ones(length, length, dtype=torch.bool).tril()


def window(length: int) -> Tensor:
    """A query sees keys at most 64 before or after itself."""
    return torch.ones(length, length, dtype=torch.bool).tril(64).triu(-64)


def segments(length: int) -> Tensor:
    """Six samples in one sequence."""
    segment = torch.arange(length) * 6 // length
    return segment[:, None] == segment


def frames(length: int) -> Tensor:
    """Four blocks of frames, each of which sees those before it as well."""
    frame = torch.arange(length) * 4 // length
    return frame[:, None] >= frame


def scatter(length: int) -> Tensor:
    """Every query sees other keys."""
    return torch.rand(length, length, generator=torch.Generator().manual_seed(0)) < 0.5


MASKS: tuple[Callable[[int], Tensor], ...] = (
    padding,
    key_padding,
    causal,
    window,
    segments,
    frames,
    scatter,
)


def forms(seen: Tensor, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """A mask as bool and as additive values: -inf is the default's only way to an empty row."""
    yield "bool", seen
    yield "-inf", torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)


def route(mask: Tensor) -> str:
    """What is planned of the mask, which is read in any case."""
    _, _, q_len, k_len = mask.shape
    try:
        return plan_packing(mask, batch=1, q_len=q_len, k_len=k_len).route
    except MaskError:
        return "none"


def flux(layers: int, args: argparse.Namespace) -> FluxTransformer2DModel:
    """A switched Flux transformer; a third of its layers have two streams, as in the original."""
    rotated = (args.head_dim // 8, args.head_dim * 7 // 16, args.head_dim * 7 // 16)
    torch.set_default_dtype(getattr(torch, args.dtype))
    with torch.device(args.device):
        model = FluxTransformer2DModel(
            num_layers=layers // 3,
            num_single_layers=layers - layers // 3,
            num_attention_heads=args.heads,
            attention_head_dim=args.head_dim,
            axes_dims_rope=rotated,
        )
    torch.set_default_dtype(torch.float32)
    enable_fa3(model, fallback="silent")
    return model.eval()


def forward_of(model: FluxTransformer2DModel, length: int) -> Forward:
    """One forward, half text and half image, with a mask that is new to it."""
    like = {"device": model.device, "dtype": model.dtype}
    text, image = length // 2, length - length // 2
    inputs = {
        "hidden_states": torch.randn(1, image, model.config.in_channels, **like),
        "encoder_hidden_states": torch.randn(1, text, model.config.joint_attention_dim, **like),
        "pooled_projections": torch.randn(1, model.config.pooled_projection_dim, **like),
        "timestep": torch.tensor([0.5], **like),
        "img_ids": torch.zeros(image, 3, **like),
        "txt_ids": torch.zeros(text, 3, **like),
    }

    @torch.no_grad()
    def forward(mask: Tensor) -> Tensor:
        return model(**inputs, joint_attention_kwargs={"attention_mask": mask.clone()}).sample

    return forward


def measure(
    mask: Tensor, x: Tensor, forward: Forward | None, args: argparse.Namespace
) -> dict[str, float]:
    """Milliseconds for the reading of a mask, attention of `x`, (1, H, S, D), and a forward."""
    runs = {
        "plan": Method(route),
        "attention": Method(lambda mask: F.scaled_dot_product_attention(x, x, x, mask)),
    }
    if forward is not None:
        runs["forward"] = Method(forward)
    times = times_of(runs, [mask], args.rounds, args.device, calls=1)
    return {name: statistics.median(of_run) for name, of_run in times.items()}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    devices = ["cpu", "cuda"]
    parser.add_argument("--device", default=devices[torch.cuda.is_available()], choices=devices)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--flux-layers", type=int, help="time a forward of so many, too")
    parser.add_argument("--threads", type=int, help="as many as PyTorch takes by itself")
    parser.add_argument("--rounds", type=int, default=11)
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    model = flux(args.flux_layers, args) if args.flux_layers else None
    against = ("attention", "forward") if model else ("attention",)
    head = itertools.chain.from_iterable((name, "share") for name in against)
    table = Table("mask", "written as", "length", "route", "plan", *head)
    for length, make in itertools.product(args.lengths, MASKS):
        shape = (1, args.heads, length, args.head_dim)
        forward = forward_of(model, length) if model else None
        for form, laid_out in forms(make(length)[None, None], dtype):
            mask = laid_out.to(args.device)
            x = torch.randn(shape, dtype=dtype).to(args.device)
            times = measure(mask, x, forward, args)
            cells = [
                (f"{times[name]:.2f} ms", f"{times['plan'] / times[name]:.1%}") for name in against
            ]
            table.add_row(
                make.__name__,
                form,
                str(length),
                route(mask),
                f"{times['plan']:.2f} ms",
                *itertools.chain.from_iterable(cells),
            )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    about = versions(args.device, "auto")
    print(", ".join(f"{name} {value}" for name, value in about.items() if value))


if __name__ == "__main__":
    main()
