"""Measure one attention call on every method: its error, time and memory."""

from __future__ import annotations

import statistics
from dataclasses import replace

import torch
from torch import Tensor

from diffusers_fa3.masks import PackingPlan
from diffusers_fa3.tools.bench.cases import Case, Inputs, make_inputs
from diffusers_fa3.tools.bench.methods import (
    Method,
    attempt,
    host_syncs,
    methods,
    peak_bytes,
    sdpa_backend,
)
from diffusers_fa3.tools.bench.tables import Row, Timing
from diffusers_fa3.tools.bench.timing import times_of

QUEUED = 4
"""Calls that are queued on a GPU at a time, if calls are short."""
WRONG_FROM = 0.02
"""Relative error above which a result is wrong; half-precision rounding is a fifth of it."""


def measure(
    case: Case, share: float | None, dtype: torch.dtype, device: str, kernel: str, rounds: int
) -> Row:
    """Measure all methods on a case at one share of valid text."""
    torch.manual_seed(0)
    rounds = min(rounds, case.most_rounds or rounds)
    calls = QUEUED if device == "cuda" and case.most_rounds is None else 1
    mask = case.mask(share, device)
    plan, packed = case.plan(mask), case.packed_plan(mask, device)
    queries_too = mask is not None and case.pads_are_queries
    without_pads = case.plan(mask, pack_queries=True) if queries_too else None
    sets = make_inputs(case, mask, packed, dtype, device)
    everything = methods(plan, without_pads, packed, kernel)

    # Which methods take the call, and with what error, memory and host waits?
    found = _judge(everything, sets[0], packed, device)
    taken = {name: method for name, method in everything.items() if not found[name].refused}
    backend, backend_kernel = "refused", ""
    if "default" in taken:
        backend, backend_kernel = sdpa_backend(taken["default"], sets[0], device)

    # How long does each method take?
    planning = Method(lambda x: case.plan(x.mask))
    times = times_of(taken | {"plan": planning}, sets, rounds, device, calls)
    needed = case.needed_pairs(mask)
    work = 4 * needed * case.heads * case.head_dim
    for name in taken:
        ms = statistics.median(times[name])
        found[name] = replace(
            found[name], ms=ms, times_ms=tuple(times[name]), tflops=work / ms / 1e9
        )
    return Row(
        case=case.name,
        dtype=str(dtype).removeprefix("torch."),
        tokens=case.text + case.image,
        share=share,
        route=plan.route,
        backend=backend,
        backend_kernel=backend_kernel,
        ideal=case.pairs / needed,
        ideal_q=case.pairs / case.needed_pairs(mask, pack_queries=queries_too),
        plan_ms=statistics.median(times["plan"]),
        rounds=rounds,
        calls=calls,
        input_sets=len(sets),
        methods=found,
    )


def _judge(
    everything: dict[str, Method], inputs: Inputs, packed: PackingPlan, device: str
) -> dict[str, Timing]:
    """Refusal, error, memory and host waits of one call per method, which also warms up."""
    found: dict[str, Timing] = {}
    default: Tensor | None = None
    for name, method in everything.items():
        result = attempt(method, inputs)
        if isinstance(result, str):
            found[name] = Timing(refused=result)
            continue
        if name == "bare":
            result = packed.unpack(result)
        default = result if name == "default" else default
        rows = rows_to_compare(inputs.mask, padded=name != "ours+q")
        error = None if default is None else error_of(result, default, rows)
        syncs = host_syncs(method, inputs) if device == "cuda" else None
        wrong = error is not None and not error <= WRONG_FROM
        megabytes = peak_bytes(method, inputs, device) / 1e6
        found[name] = Timing(error=error, wrong=wrong, syncs=syncs, peak_mb=megabytes)
    return found


def rows_to_compare(mask: Tensor | None, *, padded: bool) -> Tensor | None:
    """The query rows whose results are compared, bool (B, Sq) or (B, 1); None: all.

    Rows that see no key are left out, since their output may be anything. If not `padded`, rows of
    padded tokens are left out too.
    """
    if mask is None:
        return None
    return mask.any(-1)[:, 0] if padded else mask[:, 0, 0]


def error_of(result: Tensor, default: Tensor, rows: Tensor | None) -> float:
    """The relative error of these rows, in the Euclidean norm."""
    difference, size = result.float() - default.float(), default.float()
    if rows is not None:
        difference, size = (torch.where(rows[:, :, None, None], x, 0) for x in (difference, size))
    return float(difference.norm() / size.norm())
