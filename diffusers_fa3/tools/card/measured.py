"""The paragraphs of what was measured: parity and speed, each with its machine and versions."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePath
from typing import Any

from diffusers_fa3.tools.card.markdown import code, escaped, table
from diffusers_fa3.tools.card.of_model import ParityOfModel, SpeedOfModel
from diffusers_fa3.tools.card.parity import ParityReport
from diffusers_fa3.tools.card.speed import Time, Timed
from diffusers_fa3.tools.check.parity import Difference, Layer
from diffusers_fa3.tools.check.served import caveat_of, kernels_of
from diffusers_fa3.tools.check.table import rows_of

TOLD = 10
"""The most problems of a failed check that are told one by one."""

PARITY_HEAD = (
    *("layers", "number", "calls", "kernel (route)"),
    *("default", "ours", "allowed", "share of allowed", "verdict"),
)
SPEED_HEAD = (
    *("calls", "dtype", "samples", "tokens", "valid text", "route"),
    *("default, ms", "ours, ms", "plan, ms", "speedup"),
)


def parity_lines(parity: ParityOfModel) -> Iterator[list[str]]:
    """The verdict and what it rests on."""
    report = parity.report
    served = kernels_of(report.layers) or (report.kernel,)
    asked = "" if served == (report.kernel,) else f" (asked for: {code(report.kernel)})"
    kernel = f"on kernel {', '.join(map(code, served))}{asked}"
    if report.passed:
        yield [f"**Passed**: {report.calls} attention calls compared, {kernel}."]
    else:
        problems = len(report.problems)
        yield [
            f"**FAILED**, {problems} {'problem' if problems == 1 else 'problems'}: "
            f"{report.calls} attention calls compared, {kernel}."
        ]
        more = [f"- and {problems - TOLD} more"] if problems > TOLD else []
        yield [*(f"- {escaped(problem)}" for problem in report.problems[:TOLD]), *more]
    yield from _caveat(kernels_of(report.layers))
    yield [
        "Each call got the inputs of a run on the default attention, and both outputs were "
        "compared with float64. Errors are relative to the largest value of the output; those of "
        "the worst call are shown. Allowed is twice the default's own error, plus a few roundings."
    ]
    if report.layers:
        rows = [(code(name), *map(escaped, cells)) for name, *cells in rows_of(report.layers)[1:]]
        yield table(PARITY_HEAD, rows)
    yield [
        *_left_to_default(report.layers),
        *(f"- With another processor than configured: {code(p)}" for p in parity.other_processors),
        *_as_a_whole(report),
        *_how("check", report.command, report.arguments, report.machine),
    ]


def speed_lines(speed: SpeedOfModel) -> Iterator[list[str]]:
    """The times of calls of the model's sizes."""
    report = speed.report
    sizes = dict.fromkeys(f"{row.heads} heads of size {row.head_dim}" for row in report.rows)
    rounds = sorted({row.rounds for row in report.rows})
    yield [
        f"Times of single attention calls with {' or '.join(sizes)}, not of the whole model. "
        f"Medians of {' or '.join(map(str, rounds))} rounds, on random tensors. Default is "
        "PyTorch's attention with the same mask. Ours includes packing, not the plan, which a "
        "model makes once per forward."
    ]
    yield from _caveat(str(kernel) for name, kernel in report.versions if name == "kernel")
    yield table(SPEED_HEAD, [_speed_row(row) for row in report.rows])
    yield [*_how("bench", report.command, (), report.versions)]


def _caveat(kernels: Iterable[str]) -> Iterator[list[str]]:
    words = caveat_of(kernels)
    if words:
        yield [words]


def _left_to_default(layers: Sequence[Layer]) -> Iterator[str]:
    reasons: Counter[str] = Counter()
    for layer in layers:
        reasons.update(layer.fallbacks)
    for reason, count in reasons.items():
        yield f"- Default attention, {count} times, not compared: {escaped(reason)}"
    unswitchable = Counter(layer.unswitchable for layer in layers if layer.unswitchable)
    for reason, count in unswitchable.items():
        yield f"- Default attention, in {count} layers, not compared: {escaped(reason)}"


def _as_a_whole(report: ParityReport) -> Iterator[str]:
    yield (
        f"- In a whole run, {report.served} attention calls were on a kernel and "
        f"{report.fallbacks} on the default attention."
    )
    if report.last_step is not None:
        yield f"- Latents after the last step: {_apart(report.last_step)}"
    if report.result is not None:
        yield f"- Result: {_apart(report.result)}"
    if report.note:
        yield f"- {escaped(report.note)}"


def _apart(difference: Difference) -> str:
    words = f"ours differs from the default by {difference.ours.typical:.1e}"
    if difference.other is not None:
        words += f", another backend of PyTorch by {difference.other.typical:.1e}"
    return f"{words}, of the largest value (root mean square)."


def _how(
    name: str,
    command: Sequence[str],
    arguments: Sequence[tuple[str, Any]],
    machine: Sequence[tuple[str, Any]],
) -> Iterator[str]:
    """What is needed to measure again."""
    if command:
        words = shlex.join(["diffusers-fa3", *map(_without_folders, command)])
        yield f"- Measured by: {code(words)}"
    else:
        yield f"- Measured by what `diffusers-fa3 {name}` calls, from Python"
    if arguments:
        yield f"- With: {_pairs(arguments)}"
    yield f"- On: {_pairs(machine)}"


def _without_folders(word: str) -> str:
    """A word of a command line; of an absolute path its last part, since a card is public."""
    option, value = re.fullmatch(r"(--?[\w-]+=)?(.*)", word, flags=re.DOTALL).groups("")  # type: ignore[union-attr]  # it matches every text
    hides = PurePath(value).is_absolute() or value.startswith("~")
    return option + (PurePath(value).name if hides else value)


def _pairs(values: Sequence[tuple[str, Any]]) -> str:
    told = [
        f"{escaped(name)} {escaped(v if isinstance(v, str) else json.dumps(v))}"
        for name, v in values
        if v != ""
    ]
    return "; ".join(told)


def _speed_row(row: Timed) -> tuple[str, ...]:
    return (
        code(row.case),
        escaped(row.dtype),
        str(row.batch),
        str(row.tokens),
        "no mask" if row.share is None else f"{100 * row.share:.3g}%",
        escaped(row.route),
        _ms(row.default),
        _ms(row.ours),
        f"{row.plan_ms:.3g}",
        "-" if row.speedup is None else f"{row.speedup:.2f}x",
    )


def _ms(time: Time) -> str:
    if time.ms is None:
        return "refused"
    return f"{time.ms:.3g}{', WRONG' if time.wrong else ''}"
