"""The coverage report: the kernel and route of each attention call, or why no kernel served it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

from diffusers_fa3.kernels import declined, executed, name_of
from diffusers_fa3.layers.record import LayerRecord


@dataclass(frozen=True)
class Row:
    """One attention layer, or all compiled graphs of one switch."""

    name: str
    processor: str
    """Class name of the layer's own processor."""
    kernel: str
    """The kernels that served the layer's calls; before the first such call, the kernel that the
    user asked for; "default" if the layer is not switched."""
    calls: dict[str, int]
    """Calls that a kernel served, by route."""
    fallbacks: dict[str, int]
    """Calls that the default attention served, by reason."""
    choices: dict[str, int] = field(default_factory=dict)
    """With `kernel="fastest"`: calls by who was the fastest, and how many times as long the second
    best takes: "default, 1.2x". Those of kernels are among `calls`, those of the default are not
    among `fallbacks`."""
    replaced: bool = False
    """Since the switch, the layer got another processor, which is not switched."""
    skipped: int = 0
    """Runs in which the processor, which made attention calls before, made none."""
    unswitchable: str = ""
    """Why the layer's processor could not be switched; its calls are not counted. Empty for all
    other layers."""


@dataclass(frozen=True)
class Coverage:
    """A row for each attention layer. `str()` gives a table, `to_dict()` a dict ready for JSON."""

    rows: tuple[Row, ...]
    plans_made: int
    plans_reused: int

    @property
    def calls(self) -> int:
        """Attention calls that a kernel served."""
        return sum(sum(row.calls.values()) for row in self.rows)

    @property
    def fallbacks(self) -> int:
        """Attention calls that the default attention served since the layer was switched."""
        return sum(sum(row.fallbacks.values()) for row in self.rows)

    @property
    def chosen_default(self) -> int:
        """Attention calls that the default attention served because it was the fastest."""
        return sum(map(_chosen_default, self.rows))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings, ints and bools."""
        return {
            "calls": self.calls,
            "fallbacks": self.fallbacks,
            "chosen_default": self.chosen_default,
            "plans": {"made": self.plans_made, "reused": self.plans_reused},
            "layers": [asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        head = ("layers", "", "processor", "kernel", "calls")
        lines = [head, *map(_cells, _alike(self.rows))]
        widths = [max(map(len, column)) for column in zip(*lines)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
            for line in lines
        ]
        reasons: Counter[str] = Counter()
        choices: Counter[str] = Counter()
        for row in self.rows:
            reasons.update(row.fallbacks)
            choices.update(row.choices)
        chosen = f", {self.chosen_default} there by choice" if self.chosen_default else ""
        skipped = sum(row.skipped for row in self.rows)
        unswitchable = Counter(row.unswitchable for row in self.rows if row.unswitchable)
        replaced = sum(row.replaced for row in self.rows)
        mend = f"{replaced} layers were given other processors: enable_fa3 switches them again"
        return "\n".join(
            [
                *table,
                f"{self.calls} calls on a kernel, {self.fallbacks} on the default attention{chosen}"
                f"; {self.plans_made} plans made, {self.plans_reused} reused",
                *(f"the fastest, {n} times: {choice}" for choice, n in choices.items()),
                *(f"default attention, {n} times: {reason}" for reason, n in reasons.items()),
                *(
                    f"default attention, not counted, in {n} layers: {reason}"
                    for reason, n in unswitchable.items()
                ),
                *([f"{skipped} runs of a processor made no attention call"] if skipped else []),
                *([mend] if replaced else []),
            ]
        )


def compiled_row(switch_id: int) -> Row | None:
    """The row of all compiled graphs of one switch; None if they have no attention call.

    The layers share this row: a graph that counted on its layer would be compiled once per layer.
    Calls are counted when they run, except in replays of a CUDA graph. Fallbacks are counted once
    per compilation.
    """
    ran = {key: n for key, n in executed.items() if key[0] == switch_id}
    left = {reason: n for (of, reason), n in declined.items() if of == switch_id}
    if not (ran or left):
        return None
    routes: Counter[str] = Counter()
    for (_, _, route), count in ran.items():
        routes[route] += count
    kernels = sorted({kernel for _, kernel, _ in ran})
    return Row("compiled graphs", "", ", ".join(kernels), dict(routes), left)


def row_of_unswitched(name: str, processor: Any, replaced: bool, unswitchable: str) -> Row:
    """The row of a layer that is not switched."""
    name_of_class = type(processor).__name__
    return Row(name, name_of_class, "default", {}, {}, replaced=replaced, unswitchable=unswitchable)


def row_of(name: str, record: LayerRecord) -> Row:
    """The row of a switched layer."""
    kernels = sorted({kernel for kernel, _ in record.calls})
    routes: Counter[str] = Counter()
    for (_, route), count in record.calls.items():
        routes[route] += count
    asked = record.settings.kernel
    return Row(
        name,
        type(record.processor).__name__,
        ", ".join(kernels) or (asked if isinstance(asked, str) else name_of(asked)),
        dict(routes),
        dict(record.fallbacks),
        dict(record.choices),
        skipped=record.skipped,
    )


def _chosen_default(row: Row) -> int:
    return sum(n for choice, n in row.choices.items() if choice.startswith("default, "))


@dataclass(frozen=True)
class _Group:
    pattern: str
    rows: tuple[Row, ...]


def _alike(rows: tuple[Row, ...]) -> list[_Group]:
    """Groups of rows that are equal up to the numbers in their names, in order of appearance."""

    def likeness(row: Row) -> tuple[object, ...]:
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.name)
        why_default = row.replaced, row.unswitchable
        counts = str(row.calls), str(row.fallbacks), str(_chosen_default(row))
        return pattern, row.processor, row.kernel, *why_default, *counts

    order = {key: i for i, key in enumerate(dict.fromkeys(map(likeness, rows)))}
    ordered = sorted(rows, key=lambda row: order[likeness(row)])
    return [_Group(str(key[0]), tuple(members)) for key, members in groupby(ordered, key=likeness)]


def _cells(group: _Group) -> tuple[str, ...]:
    first = group.rows[0]
    routes: Counter[str] = Counter()
    for row in group.rows:
        routes.update(row.calls)
        routes["default"] += sum(row.fallbacks.values()) + _chosen_default(row)
    name = first.name if len(group.rows) == 1 else group.pattern
    counted = ", ".join(f"{route} {count}" for route, count in routes.items() if count)
    return name, f"x{len(group.rows)}", first.processor, first.kernel, counted or _uncounted(first)


def _uncounted(row: Row) -> str:
    if row.unswitchable:
        return "cannot be switched"
    if row.kernel == "default":
        return "replaced" if row.replaced else "not switched"
    return "none yet"
