"""The file of `diffusers-fa3 bench --json`, read with care."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_fa3.errors import InputError
from diffusers_fa3.tools.card.fields import Fields, read_fields

MADE_BY = "diffusers-fa3 bench --json FILE"
SCHEMA = 1
"""The file has had no number so far; one that comes with another number is another form."""


@dataclass(frozen=True)
class Time:
    """One method on one call: milliseconds, or None if it refused; and whether it was wrong."""

    ms: float | None
    wrong: bool


@dataclass(frozen=True)
class Timed:
    """One attention call, on PyTorch's attention and on ours."""

    case: str
    batch: int
    heads: int
    head_dim: int
    dtype: str
    tokens: int
    share: float | None
    """Share of the text that is valid; None: no mask."""
    route: str
    plan_ms: float
    rounds: int
    default: Time
    ours: Time

    @property
    def speedup(self) -> float | None:
        """How many times faster ours is; None if one of them has no right result."""
        default, ours = self.default.ms, self.ours.ms
        wrong = self.default.wrong or self.ours.wrong
        return None if not default or not ours or wrong else default / ours


@dataclass(frozen=True)
class SpeedReport:
    """What the command measured, and on what."""

    file: Path
    rows: tuple[Timed, ...]
    versions: tuple[tuple[str, Any], ...]
    command: tuple[str, ...]


def read_speed(file: Path) -> SpeedReport:
    """Read a report.

    Raises:
        InputError: the file is no such report, or is of another schema.
    """
    fields = read_fields(file, MADE_BY)
    if {"layers", "coverage"} <= fields.values.keys():
        raise InputError(
            f"a speed report is of diffusers-fa3 bench; {file} is of check. Give it by --parity"
        )
    schema = fields.values.get("schema", SCHEMA)
    if schema != SCHEMA:
        raise InputError(
            f"a speed report has schema {SCHEMA} or none; {file} has {schema}. Run {MADE_BY} "
            "again, with this release"
        )
    cases = [*fields.inside_each("cases")]
    rows = tuple(_timed(row, cases) for row in fields.inside_each("rows"))
    if not rows:
        raise InputError(f"a speed report has measured calls; {file} has none. Run {MADE_BY} again")
    return SpeedReport(file, rows, fields.pairs("versions"), fields.texts("command"))


def _timed(row: Fields, cases: list[Fields]) -> Timed:
    methods = row.inside("methods")
    name, tokens = row.text("case"), row.count("tokens")
    case = _case_of(row, name, tokens, cases)
    return Timed(
        case=name,
        batch=case.count("batch"),
        heads=case.count("heads"),
        head_dim=case.count("head_dim"),
        dtype=row.text("dtype"),
        tokens=tokens,
        share=row.number("share"),
        route=row.text("route"),
        plan_ms=row.known_number("plan_ms"),
        rounds=row.count("rounds"),
        default=_time(methods.inside("default")),
        ours=_time(methods.inside("ours")),
    )


def _case_of(row: Fields, name: str, tokens: int, cases: list[Fields]) -> Fields:
    """The case of a row. A name may come at several lengths."""
    for case in cases:
        if case.text("name") == name and case.count("text") + case.count("image") == tokens:
            return case
    raise InputError(
        f"each row of a speed report is of one of its cases; {row.file} has a row of {name} at "
        f"{tokens} tokens, and no such case. Run {MADE_BY} again"
    )


def _time(method: Fields) -> Time:
    return Time(method.number("ms"), method.flag("wrong"))
