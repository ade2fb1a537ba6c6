"""What a check found: every layer and step, whether it passed, and why not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers_fa3.tools.check.as_dict import dict_of
from diffusers_fa3.tools.check.budget import Errors, Measured, allowed_on_ranks
from diffusers_fa3.tools.check.served import caveat_of, kernels_of
from diffusers_fa3.tools.check.table import table_of

UNCOMPARED = "the whole is not compared, since the kernel did not serve"

TOLD = 10
"""The most problems that are printed; the dict has all."""


@dataclass(frozen=True)
class Call:
    """One attention call that a kernel served, compared on the inputs of the default's run."""

    layer: str
    run: int
    """The layer's calls before this one."""
    kernel: str
    route: str
    dtype: str
    q_shape: tuple[int, ...]
    """(B, Sq, H, D)"""
    k_len: int
    mask: str
    """dtype and shape; empty without a mask."""
    measured: Measured
    rank: int | None = None
    """The process that made the call, where the model was split over several."""

    @property
    def passed(self) -> bool:
        """Whether the error is within the budget, by its largest and by its typical value."""
        return self.measured.share <= 1

    def __str__(self) -> str:
        where = f"{self.layer}, call {self.run}{_of_rank(self.rank)}"
        what = f"{where}, on {self.kernel} ({self.route}): "
        ours, allowed = self.measured.ours, self.measured.allowed
        if not math.isfinite(ours.largest):
            return f"{what}the output is not finite where the default's is"
        by_largest = ours.largest > allowed.largest
        kind = "largest" if by_largest or self.passed else "typical"
        found, limit, default = (
            getattr(errors, kind) for errors in (ours, allowed, self.measured.default)
        )
        return (
            f"{what}{kind} error {found:.1e} of the largest value; {limit:.1e} is allowed, "
            f"the default's is {default:.1e}"
        )


@dataclass(frozen=True)
class Raised:
    """An attention call that the kernel refused, though asked for, or in which it failed."""

    layer: str
    kernel: str
    error: str
    rank: int | None = None

    def __str__(self) -> str:
        return f"{self.layer}{_of_rank(self.rank)}, on {self.kernel}: {self.error}"


def _of_rank(rank: int | None) -> str:
    return "" if rank is None else f", rank {rank}"


@dataclass(frozen=True)
class Layer:
    """One attention layer in a run on the default attention."""

    name: str
    processor: str
    calls: tuple[Call, ...] = ()
    raised: tuple[Raised, ...] = ()
    fallbacks: Mapping[str, int] = field(default_factory=dict)
    """Calls that the default attention serves, by reason; these are not compared."""
    unswitchable: str = ""
    """Why the layer cannot be switched; empty for all others."""

    @property
    def worst(self) -> Call | None:
        """The call that uses most of its budget."""
        return max(self.calls, key=lambda call: call.measured.share, default=None)


@dataclass(frozen=True)
class Difference:
    """How far two runs are apart, after a step or in the result; relative to the default's."""

    ours: Errors
    """Ours against the default."""
    other: Errors | None
    """The default on another backend of PyTorch, which is as right, against the default."""
    on_ranks: Errors | None = None
    """Ours on a model that is split over ranks, against the default on one process."""


@dataclass(frozen=True)
class Drawn:
    """The whole model or pipeline on its default attention and on ours."""

    steps: tuple[Difference, ...]
    """The latents after each step; empty where the pipeline does not hand them out."""
    result: Difference | None
    """The pictures, the video or the model's output."""
    note: str = ""
    """What could not be compared, and why."""
    raised: str = ""
    """The error with which the run on ours ended."""
    rounding: float = 0.0
    """Of the model's dtype; by it and the differences, the end of the run on ranks is judged."""

    @property
    def end(self) -> tuple[str, Difference] | None:
        """What the run on ranks is judged by: the last latents, or else the result."""
        if self.steps:
            return "the latents after the last step", self.steps[-1]
        return None if self.result is None else ("the result", self.result)

    @property
    def allowed_on_ranks(self) -> float | None:
        """How far the end of the run on ranks may be from the default's; None if there is none."""
        if self.end is None or self.end[1].on_ranks is None:
            return None
        return allowed_on_ranks(self.end[1].ours, self.end[1].other, self.rounding)


@dataclass(frozen=True)
class Parity:
    """What `check_parity` found. `str()` gives a table, `to_dict()` a dict ready for JSON."""

    model: str
    kernel: str
    layers: tuple[Layer, ...]
    drawn: Drawn
    coverage: Any
    """The `Coverage` of the run on ours; of the run layer by layer if the former did not end."""
    arguments: Mapping[str, Any]
    """What the pipeline or model was called with; tensors by shape."""
    machine: Mapping[str, str]
    pictures: Any = field(default=None, repr=False, compare=False)
    """The pictures of both runs, for the report."""
    ranks: int = 1
    """The processes that the model was split over."""
    split: str = ""
    """How it was split: the arguments of diffusers' `ContextParallelConfig`."""

    @property
    def calls(self) -> int:
        """The attention calls that were compared."""
        return sum(len(layer.calls) for layer in self.layers)

    @property
    def passed(self) -> bool:
        """Whether every compared call is within its budget, and there is no other problem."""
        return not self.problems

    @property
    def problems(self) -> tuple[str, ...]:
        """Why the check failed, each with the layer and the kernel; empty if it passed."""
        found: list[str] = []
        for layer in self.layers:
            found += [str(raised) for raised in layer.raised[:1]]
            if layer.worst is not None and not layer.worst.passed:
                found.append(str(layer.worst))
            if self.kernel != "auto" and not layer.raised:
                found += [
                    f"{layer.name}: the default attention served {n} calls, though kernel "
                    f"{self.kernel} was asked for: {reason}"
                    for reason, n in layer.fallbacks.items()
                ]
        if not self.calls and not found:
            reasons = {reason for layer in self.layers for reason in layer.fallbacks}
            why = "; ".join(sorted(reasons)) or "no layer made a call"
            found.append(f"no attention call was served by a kernel, so none was compared: {why}")
        if self.drawn.raised:
            found.append(f"the run on kernel {self.kernel} raised {self.drawn.raised}")
        result = self.drawn.result
        if result is not None and not math.isfinite(result.ours.largest):
            found.append("the result on ours is not finite where the default's is")
        return (*found, *_too_far(self.drawn, self.ranks))

    @property
    def where(self) -> str:
        """The kernels that served, what was asked for, and the ranks if there are several."""
        served = kernels_of(self.layers) or (self.kernel,)
        asked = "" if served == (self.kernel,) else f" (asked for: {self.kernel})"
        ranks = f", on {self.ranks} ranks ({self.split})" if self.split else ""
        return f"kernel {', '.join(served)}{asked}{ranks}"

    @property
    def caveat(self) -> str:
        """What the verdict does not tell; empty if there is nothing."""
        return caveat_of(kernels_of(self.layers))

    def to_dict(self) -> dict[str, Any]:
        """The check as plain dicts, lists, strings, numbers and bools; see docs/check.md."""
        return dict_of(self)

    def __str__(self) -> str:
        problems = self.problems
        verdict = f"FAILED, {len(problems)} problems:" if problems else "passed"
        more = [f"  ... and {len(problems) - TOLD} more"] if problems[TOLD:] else []
        return "\n".join(
            [
                table_of(self.layers),
                *_steps_words(self.drawn),
                f"{self.calls} calls compared with float64 on {self.where}: {verdict}",
                *(f"  {problem}" for problem in problems[:TOLD]),
                *more,
                *filter(None, [self.caveat]),
            ]
        )


def _too_far(drawn: Drawn, ranks: int) -> list[str]:
    """What is wrong with the whole on ranks. Not finite is further than any number."""
    allowed = drawn.allowed_on_ranks
    if drawn.end is None or allowed is None:
        return []
    what, difference = drawn.end
    found = difference.on_ranks
    assert found is not None
    if found.typical <= allowed:
        return []
    return [
        f"ours on {ranks} ranks ends too far from the default on one process: {what}, by "
        f"{found.typical:.1e}; {allowed:.1e} is allowed"
    ]


def _steps_words(drawn: Drawn) -> list[str]:
    last = [("the latents after the last step", step) for step in drawn.steps[-1:]]
    result = [("the result", drawn.result)] if drawn.result is not None else []
    lines = [
        f"{what}: ours differs from the default by {difference.ours.typical:.1e}"
        + (
            f", another default backend by {difference.other.typical:.1e}"
            if difference.other is not None
            else ""
        )
        + (
            f", ours on ranks by {difference.on_ranks.typical:.1e}"
            if difference.on_ranks is not None
            else ""
        )
        for what, difference in [*last, *result]
    ]
    return [*lines, *filter(None, [drawn.note])]
