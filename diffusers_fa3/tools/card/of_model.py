"""Whether a report is of this model: as far as its data tells, or an error in words.

A parity report names the class and every attention layer: all must be those of the folder, and
some call must have the heads and head size of a layer. Weights are not named, so a fine-tuned model
passes for its base. A speed report is of calls of some sizes: those count that the model has.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from diffusers_fa3.errors import InputError
from diffusers_fa3.tools.card.parity import MADE_BY, ParityReport
from diffusers_fa3.tools.card.speed import SpeedReport
from diffusers_fa3.tools.info.layers import LayerGroup
from diffusers_fa3.tools.info.model import ModelFacts


@dataclass(frozen=True)
class ParityOfModel:
    """A parity report of the folder's model."""

    report: ParityReport
    other_processors: tuple[str, ...]
    """Those of the report that the configuration does not give: fused ones, adapters."""


@dataclass(frozen=True)
class SpeedOfModel:
    """A speed report's calls that have the sizes of the model's layers."""

    report: SpeedReport
    left_out: int
    """Calls of other sizes."""


def parity_of_model(report: ParityReport, facts: ModelFacts) -> ParityOfModel:
    """The report, if it is of the folder's model.

    Raises:
        InputError: class, layers or head sizes are not those of the folder.
    """
    if report.model != facts.model:
        raise InputError(
            f"a parity report is of the model of the folder, {facts.model}; {report.file} is of "
            f"{report.model}. Run {MADE_BY} on this folder"
        )
    skipped = {name for name, _ in facts.skipped}  # what could not be built cannot be compared
    layers = [layer for layer in report.layers if layer.name.partition(".")[0] not in skipped]
    there: Counter[str] = Counter()
    for name, group in named_groups(facts):
        there[name] += group.count
    told = Counter(pattern_of(layer.name) for layer in layers)
    if there != told:
        name = next(iter((there - told) + (told - there)))
        raise InputError(
            f"a parity report is of every attention layer of the folder; of {name} the folder has "
            f"{there[name]}, and {report.file} {told[name]}: it is of another {facts.model}, or of "
            f"a part of it. Run {MADE_BY} on this folder"
        )
    measured = {call.q_shape[-2:] for layer in layers for call in layer.calls}
    if measured and not any(_fits(size, of) for size in measured for of in _sizes(facts)):
        raise InputError(
            f"a parity report is of calls of the sizes of the folder, {_words(_known(facts))}; "
            f"{report.file} has {_words(measured)}: it is of another {facts.model}. Run {MADE_BY} "
            "on this folder"
        )
    configured = {group.processor for _, group in named_groups(facts)}
    others = dict.fromkeys(x.processor for x in layers if x.processor not in configured)
    return ParityOfModel(report, tuple(others))


def speed_of_model(report: SpeedReport, facts: ModelFacts) -> SpeedOfModel:
    """The calls of the report that have heads and head size of a layer of the model.

    Raises:
        InputError: there is none.
    """
    sizes = _sizes(facts)
    rows = tuple(r for r in report.rows if any(_fits((r.heads, r.head_dim), of) for of in sizes))
    if not rows:
        known = _known(facts)
        heads, size = min(known, default=(24, 128))
        raise InputError(
            f"a speed report has calls of the sizes of the model, {_words(known)}; {report.file} "
            f"has {_words({(row.heads, row.head_dim) for row in report.rows})}. Run diffusers-fa3 "
            f"bench --heads {heads} --head-dim {size} --json FILE"
        )
    return SpeedOfModel(replace(report, rows=rows), len(report.rows) - len(rows))


def named_groups(facts: ModelFacts) -> Iterator[tuple[str, LayerGroup]]:
    """(name, group) of all layers; the name as in a report, with * for numbers."""
    for component in facts.components:
        for group in component.layers:
            yield ".".join(filter(None, (component.name, group.layers))), group


def pattern_of(layer: str) -> str:
    """A layer's name with * for numbers."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", layer)


def _sizes(facts: ModelFacts) -> set[tuple[int | None, int | None]]:
    return {(group.heads, group.head_dim) for _, group in named_groups(facts)}


def _known(facts: ModelFacts) -> set[tuple[int, ...]]:
    return {(h, d) for h, d in _sizes(facts) if h is not None and d is not None}


def _fits(size: tuple[int, ...], of: tuple[int | None, int | None]) -> bool:
    """Whether heads and head size are those of a layer; what is not known of it fits."""
    return all(known in (None, n) for n, known in zip(size, of))


def _words(sizes: set[tuple[int, ...]]) -> str:
    return ", ".join(f"{heads} heads of size {size}" for heads, size in sorted(sizes)) or "none"
