"""The error budget of a parity test, taken from the error of the default attention itself."""

from __future__ import annotations

import torch

FACTOR = 2.0
FLOOR = 1e-6  # relative to the largest value of the output


def error(output: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the largest absolute difference, in float64."""
    return (output.double() - exact.double()).abs().max().item()


def budget(default: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the error allowed: twice that of the default, plus a floor for rounding.

    Args:
        default: output of the default attention in the precision under test.
        exact: the same in float64.
    """
    return FACTOR * error(default, exact) + FLOOR * exact.abs().max().item()


def assert_within_budget(output: torch.Tensor, default: torch.Tensor, exact: torch.Tensor) -> None:
    """Assert that `output` is about as close to `exact` as `default` is."""
    assert output.shape == default.shape
    assert output.dtype == default.dtype
    assert torch.isfinite(output).all(), "output is not finite"
    allowed = budget(default, exact)
    found = error(output, exact)
    assert found <= allowed, f"error {found:.3g} against float64; {allowed:.3g} is allowed"
