"""A check as plain dicts, whose keys docs/check.md lists."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers_fa3.tools.check.budget import Errors
    from diffusers_fa3.tools.check.parity import Call, Difference, Layer, Parity, Raised

SCHEMA = 1
"""The version of the keys: another one where a key is gone or means something else."""


def dict_of(parity: Parity) -> dict[str, Any]:
    """Dicts, lists, strings, numbers and bools; what is not finite is a string."""
    return {
        "schema": SCHEMA,
        "passed": parity.passed,
        "problems": list(parity.problems),
        "model": parity.model,
        "kernel": parity.kernel,
        "calls": parity.calls,
        "layers": [_layer_dict(layer) for layer in parity.layers],
        "steps": [_difference_dict(step) for step in parity.drawn.steps],
        "result": parity.drawn.result and _difference_dict(parity.drawn.result),
        "note": parity.drawn.note,
        "ranks": parity.ranks,
        "split": parity.split,
        "allowed_on_ranks": parity.drawn.allowed_on_ranks,
        "coverage": parity.coverage.to_dict(),
        "arguments": dict(parity.arguments),
        "machine": dict(parity.machine),
    }


def _layer_dict(layer: Layer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "processor": layer.processor,
        "passed": not layer.raised and all(call.passed for call in layer.calls),
        "fallbacks": dict(layer.fallbacks),
        "unswitchable": layer.unswitchable,
        "raised": [_raised_words(raised) for raised in layer.raised],
        "calls": [_call_dict(call) for call in layer.calls],
    }


def _call_dict(call: Call) -> dict[str, Any]:
    measured = call.measured
    return {
        "run": call.run,
        "rank": call.rank,
        "kernel": call.kernel,
        "route": call.route,
        "dtype": call.dtype,
        "q_shape": list(call.q_shape),
        "k_len": call.k_len,
        "mask": call.mask,
        "passed": call.passed,
        "default": _errors_dict(measured.default),
        "ours": _errors_dict(measured.ours),
        "allowed": _errors_dict(measured.allowed),
        "unknown": measured.unknown,
    }


def _raised_words(raised: Raised) -> str:
    return raised.error if raised.rank is None else f"rank {raised.rank}: {raised.error}"


def _difference_dict(difference: Difference) -> dict[str, Any]:
    extra = {"other": difference.other, "on_ranks": difference.on_ranks}
    return {
        "ours": _errors_dict(difference.ours),
        **{name: errors and _errors_dict(errors) for name, errors in extra.items()},
    }


def _errors_dict(errors: Errors) -> dict[str, float | str]:
    return {"largest": _number(errors.largest), "typical": _number(errors.typical)}


def _number(value: float) -> float | str:
    """JSON has no word for inf and nan."""
    return value if math.isfinite(value) else str(value)
