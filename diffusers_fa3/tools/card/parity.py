"""The report.json of `diffusers-fa3 check`, read with care."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers_fa3.errors import InputError
from diffusers_fa3.tools.card.fields import Fields, read_fields
from diffusers_fa3.tools.check.as_dict import SCHEMA
from diffusers_fa3.tools.check.budget import Errors, Measured
from diffusers_fa3.tools.check.parity import Call, Difference, Layer, Raised

MADE_BY = "diffusers-fa3 check --out DIR"


@dataclass(frozen=True)
class Reported(Measured):
    """Errors as a report has them, with what it allowed."""

    limit: Errors = field(kw_only=True)

    @property
    def allowed(self) -> Errors:
        """What the report allowed."""
        return self.limit


@dataclass(frozen=True)
class ParityReport:
    """What `check_parity` found, as its report has it."""

    file: Path
    passed: bool
    problems: tuple[str, ...]
    model: str
    """Class name."""
    kernel: str
    """The kernel that was asked for."""
    layers: tuple[Layer, ...]
    last_step: Difference | None
    result: Difference | None
    note: str
    served: int
    """Attention calls on a kernel in the whole run."""
    fallbacks: int
    """Attention calls on the default attention in the whole run."""
    arguments: tuple[tuple[str, Any], ...]
    machine: tuple[tuple[str, Any], ...]
    command: tuple[str, ...]
    """Empty if the report was not written by the command."""

    @property
    def calls(self) -> int:
        """The attention calls that were compared."""
        return sum(len(layer.calls) for layer in self.layers)


def read_parity(file: Path) -> ParityReport:
    """Read a report.

    Raises:
        InputError: the file is no such report, of another schema, or contradicts itself.
    """
    fields = read_fields(file, MADE_BY)
    if {"cases", "rows"} <= fields.values.keys():
        raise InputError(
            f"a parity report is of diffusers-fa3 check; {file} is of bench. Give it by --speed"
        )
    if fields.values.get("schema") != SCHEMA:
        raise InputError(
            f"a parity report has schema {SCHEMA}; {file} has "
            f"{fields.values.get('schema', 'none')}. Run {MADE_BY} again, with this release"
        )
    steps = [_difference(step) for step in fields.inside_each("steps")]
    coverage = fields.inside("coverage")
    report = ParityReport(
        file=file,
        passed=fields.flag("passed"),
        problems=fields.texts("problems"),
        model=fields.text("model"),
        kernel=fields.text("kernel"),
        layers=tuple(_layer(layer) for layer in fields.inside_each("layers")),
        last_step=steps[-1] if steps else None,
        result=None
        if fields.values.get("result") is None
        else _difference(fields.inside("result")),
        note=fields.text("note"),
        served=coverage.count("calls"),
        fallbacks=coverage.count("fallbacks"),
        arguments=fields.pairs("arguments"),
        machine=fields.pairs("machine"),
        command=fields.texts("command") if "command" in fields.values else (),
    )
    _agrees_with_itself(report, fields.count("calls"))
    return report


def _agrees_with_itself(report: ParityReport, calls: int) -> None:
    """A verdict that the numbers do not bear out must not reach a card."""
    failed = [layer.name for layer in report.layers if layer.raised or not _within_budget(layer)]
    wrong = ""
    if report.calls != calls:
        wrong = f"it says {calls} calls and lists {report.calls}"
    elif report.passed and (report.problems or failed or not calls):
        what = [*report.problems, *failed, "no call was compared"][0]
        wrong = f"it says that the check passed, and also: {what}"
    elif not report.passed and not report.problems:
        wrong = "it says that the check failed, and names no problem"
    if wrong:
        raise InputError(
            f"a parity report agrees with itself; in {report.file} {wrong}. Run {MADE_BY} again"
        )


def _within_budget(layer: Layer) -> bool:
    return all(call.passed for call in layer.calls)


def _layer(fields: Fields) -> Layer:
    name = fields.text("name")
    fallbacks = fields.inside("fallbacks")
    calls = tuple(_call(name, call) for call in fields.inside_each("calls"))
    return Layer(
        name=name,
        processor=fields.text("processor"),
        calls=calls,
        raised=tuple(Raised(name, "", error) for error in fields.texts("raised")),
        fallbacks={reason: fallbacks.count(reason) for reason, _ in fields.pairs("fallbacks")},
        unswitchable=fields.text("unswitchable"),
    )


def _call(layer: str, fields: Fields) -> Call:
    default, ours, allowed = (
        _errors(fields.inside(name)) for name in ("default", "ours", "allowed")
    )
    return Call(
        layer=layer,
        run=fields.count("run"),
        kernel=fields.text("kernel"),
        route=fields.text("route"),
        dtype=fields.text("dtype"),
        q_shape=_shape(fields),
        k_len=fields.count("k_len"),
        mask=fields.text("mask"),
        measured=Reported(default, ours, 0.0, fields.count("unknown"), limit=allowed),
    )


def _shape(fields: Fields) -> tuple[int, ...]:
    shape = fields.counts("q_shape")
    if len(shape) != 4:
        raise fields.wrong("q_shape", "a list of four numbers: B, Sq, H, D", [*shape])
    return shape


def _difference(fields: Fields) -> Difference:
    other = fields.values.get("other")
    return Difference(
        _errors(fields.inside("ours")), None if other is None else _errors(fields.inside("other"))
    )


def _errors(fields: Fields) -> Errors:
    return Errors(fields.known_number("largest"), fields.known_number("typical"))
