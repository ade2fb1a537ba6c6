"""The errors of one attention call against float64, and the error that is allowed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_fa3.tools.check.exact import AttentionCall, exact_blocks

FACTOR = 2.0
"""How many times the default's own error is allowed."""
ULPS = 8
"""What is allowed besides: roundings of the sums in a kernel, relative to the largest value."""


RANKS_FACTOR = 8.0
"""How many times the usual difference of two runs the run on ranks may be from one process."""


@dataclass(frozen=True)
class Errors:
    """How far an output is from float64, relative to the largest value of the exact output."""

    largest: float
    typical: float
    """The root of the mean square."""


@dataclass(frozen=True)
class Measured:
    """The errors of the default attention and of ours in one call, on the same inputs."""

    default: Errors
    ours: Errors
    floor: float
    unknown: int = 0
    """Values that the default does not give as finite numbers, which are left out."""

    @property
    def allowed(self) -> Errors:
        """Twice the default's own error, and a few roundings."""
        return Errors(
            FACTOR * self.default.largest + self.floor, FACTOR * self.default.typical + self.floor
        )

    @property
    def share(self) -> float:
        """The share of the budget that ours uses: up to 1 passes; inf if ours is not finite."""
        pairs = zip(
            (self.ours.largest, self.ours.typical), (self.allowed.largest, self.allowed.typical)
        )
        shares = [found / allowed for found, allowed in pairs]
        return max(shares) if all(share < torch.inf for share in shares) else torch.inf


def allowed_on_ranks(ours: Errors, other: Errors | None, rounding: float) -> float:
    """How far a run on ranks may be from the default's on one process, in the root mean square.

    Steps make a large difference out of a small one, on any attention. How large, these show: ours
    and another backend of PyTorch on one process, which are as right. Where a model is split, its
    other layers round in another order, too, and there are more of them than of attention: right
    models come out up to 4 times as far apart in bfloat16. Tokens of other ranks that are missed,
    or taken for others, make a difference of 100 times and more in a model that was trained.

    Args:
        ours: ours against the default, on one process.
        other: the default on another backend, likewise; None if it failed.
        rounding: one rounding of the model's dtype, for models whose attention does not show.
    """
    known = [ours.typical, 0.0 if other is None else other.typical]
    usual = max((found for found in known if math.isfinite(found)), default=0.0)
    return RANKS_FACTOR * usual + rounding


def measure(call: AttentionCall, default: Tensor, ours: Tensor) -> Measured:
    """Compare two (B, Sq, H, Dv) outputs of the same call with float64."""
    zero = torch.zeros((), dtype=torch.float64, device=call.q.device)
    peak, count, largest, squares = zero, zero, [zero, zero], [zero, zero]
    for block in exact_blocks(call):
        outputs = [block.of(output) for output in (default, ours)]
        known = outputs[0].isfinite() & block.out.isfinite()
        peak = torch.maximum(peak, block.out.abs().where(known, 0.0).amax())
        count = count + known.sum()
        for i, output in enumerate(outputs):
            error = (output - block.out).where(known, 0.0)
            largest[i] = torch.maximum(largest[i], error.abs().amax())
            squares[i] = squares[i] + error.square().sum()
    # One read of the device for all.
    highest, known_values, *found = torch.stack([peak, count, *largest, *squares]).tolist()
    unit, many = highest or 1.0, max(known_values, 1.0)
    of_default, of_ours = (
        Errors(found[i] / unit, (found[2 + i] / many) ** 0.5 / unit) for i in (0, 1)
    )
    rounding = torch.float64 if default.dtype == torch.float64 else torch.float32
    floor = ULPS * torch.finfo(rounding).eps
    return Measured(of_default, of_ours, floor, default.numel() - int(known_values))
