"""Helpers for tests that switch models of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from zoo import CASES, MISSING, Case, Layout
from zoo.budget import assert_within_budget, budget, error
from zoo.case import cast
from zoo.watch import watched

from diffusers_fa3 import FA3AttnProcessor, coverage


class ByName(dict[str, Case]):
    """Cases by name. Asking for a case that the installed diffusers lacks skips the test."""

    def __missing__(self, name: str) -> Case:
        __tracebackhide__ = True
        # The installed diffusers lacks the model; CI also runs newer releases, which have it.
        pytest.skip(f"{name}: {MISSING[name]}")


BY_NAME = ByName({case.name: case for case in CASES})

Treatment = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Expected:
    """The results of a treated model on its default attention.

    Attributes:
        output: the output in the precision under test.
        exact: the output in float64.
        calls: the number of attention calls in one forward.
    """

    output: torch.Tensor
    exact: torch.Tensor
    calls: int

    def differs_from(self, other: Expected) -> bool:
        """Whether the outputs differ by far more than rounding."""
        return error(self.exact, other.exact) > 10 * budget(self.output, self.exact)


def run(case: Case, model: nn.Module, layout: Layout) -> torch.Tensor:
    """One forward. Its inputs are on the CPU, even if the weights are offloaded elsewhere."""
    with torch.no_grad():
        inputs = cast(case.inputs(layout, 0.0), model.dtype)
        return case.pick(model(**inputs, return_dict=False))


def expect(case: Case, layout: Layout, treat: Treatment = lambda model: model) -> Expected:
    """The results of the treated model on its default attention."""
    output = run(case, treat(case.build()), layout)
    with watched() as log:
        run(case, treat(case.build()), layout)
    exact = run(case, treat(case.build(torch.float64)), layout)
    return Expected(output, exact, len(log.calls))


def assert_on_the_kernel(case: Case, model: nn.Module, layout: Layout, expected: Expected) -> None:
    """One more forward: its output is right, and every call is on the kernel and counted."""
    before = coverage(model)
    assert_within_budget(run(case, model, layout), expected.output, expected.exact)
    after = coverage(model)
    assert after.calls - before.calls == expected.calls > 0
    assert after.fallbacks == before.fallbacks


def processors(model: nn.Module) -> dict[str, object]:
    """The processor of every attention layer."""
    modules = model.named_modules()
    return {name: layer.processor for name, layer in modules if hasattr(layer, "processor")}


def switched(model: nn.Module) -> set[str]:
    """The names of the layers that are switched."""
    return {name for name, p in processors(model).items() if isinstance(p, FA3AttnProcessor)}


def assert_same_objects(model: nn.Module, before: dict[str, object]) -> None:
    """Every layer has the same processor object as before."""
    after = processors(model)
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
