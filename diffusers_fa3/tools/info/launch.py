"""The child of a probe: load one kernel and make three small calls, each told before and after.

Run as `python -m diffusers_fa3.tools.info.launch PROVIDER_FILE LOG_FILE`. Whatever happens to this
process, the log tells how far it came.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_fa3.kernels import Kernel, Provider
from diffusers_fa3.options import DENSE, Lengths, Options
from diffusers_fa3.tools.info.builds import build_of

LENGTHS = (48, 64)
"""Tokens of the two samples of each call."""
HEADS, HEAD_DIM = 2, 64
WRONG_FROM = 5e-2
"""The error from which a result in half precision is wrong: rounding gives a tenth of it."""

Tell = Callable[..., None]


def try_kernel(provider: Provider, tell: Tell) -> None:
    """Load and launch a kernel, and tell of each step."""
    kernel = _try(tell, "load", provider.load)
    if kernel is None:
        return
    tell("load", "ok", build=asdict(build_of(kernel)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for step in ("dense", "packed", "seqused"):
        if provider.cuda and device == "cpu":
            tell(step, "skipped", "needs a CUDA device")
        elif not _built(kernel, step):
            tell(step, "skipped", f"built without {'seqused_k' if step == 'seqused' else step}")
        else:
            error = _try(tell, step, partial(_launch, kernel, step, device))
            if error is not None and not error <= WRONG_FROM:
                tell(step, "wrong", f"the result differs from PyTorch's attention by {error:.2g}")
            elif error is not None:
                tell(step, "ok")


def _try(tell: Tell, step: str, do: Callable[[], Any]) -> Any:
    """The result of a step; None if it raised, which is told."""
    tell(step, "begins")
    try:
        return do()
    except Exception as error:  # a kernel may raise anything; the user is told
        first_line = next(iter(str(error).splitlines()), "")
        tell(step, "failed", f"{type(error).__name__}: {first_line}")
        return None


def _built(kernel: Kernel, step: str) -> bool:
    limits = kernel.limits
    return {"dense": limits.dense, "packed": limits.varlen, "seqused": limits.seqused_k}[step]


def _launch(kernel: Kernel, step: str, device: str) -> float:
    """The largest difference of a kernel's result from PyTorch's, over valid rows."""
    dtypes = kernel.limits.dtypes
    dtype = next(d for d in (torch.bfloat16, torch.float16, torch.float32) if d in dtypes)
    shape = (3, len(LENGTHS), max(LENGTHS), HEADS, HEAD_DIM)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(shape, generator=generator, device="cpu").to(device, dtype)
    options = Options(HEAD_DIM**-0.5)
    used = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    valid = torch.arange(max(LENGTHS), device=device) < used[:, None]
    mask = None if step == "dense" else valid[:, None, None, :]
    wide_q, wide_k, wide_v = (x.float().transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, mask).transpose(1, 2)
    if step == "packed":
        ends = F.pad(used.cumsum(0), (1, 0)).to(torch.int32)
        lengths = Lengths(ends, ends, max(LENGTHS), max(LENGTHS))
        got = kernel.forward(q[valid], k[valid], v[valid], options, lengths)[0]
        return _difference(got, expected[valid])
    lengths = Lengths(seqused_k=used) if step == "seqused" else DENSE
    return _difference(kernel.forward(q, k, v, options, lengths)[0], expected)


def _difference(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected).abs().max())  # waits for the GPU


def main(provider_file: str, log_file: str) -> None:
    """Probe the provider that is pickled in a file, and append a JSON line to the log per event."""
    with open(log_file, "a", buffering=1) as log:

        def tell(step: str, outcome: str, detail: str = "", **more: Any) -> None:
            line = {"step": step, "outcome": outcome, "detail": detail, **more}
            log.write(json.dumps(line) + "\n")

        tell("load", "begins")
        try_kernel(pickle.loads(Path(provider_file).read_bytes()), tell)


if __name__ == "__main__":
    main(*sys.argv[1:])
