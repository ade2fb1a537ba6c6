"""What diffusers' own attention makes of masks under context parallelism, on two processes.

`docs/several_gpus.md` has the table. `python tests/test_upstream_parallel.py` measures it and
writes it there.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ranks import degrees, results, split
from releases import has, needs
from support import markdown
from torch import nn
from zoo import CASES, Case, Layout

from diffusers_fa3 import cp_plan, enable_fa3
from diffusers_fa3.layers import host

PAGE = Path(__file__).parents[1] / "docs" / "several_gpus.md"
START, END = "<!-- table: upstream_parallel -->\n", "<!-- /table -->"

RANKS = 2
MODES = {"U2": "Ulysses", "R2": "ring"}
TOLERANCE = 1e-5

EQUAL = "equal"
WORDS = (
    "does not support return_lse=True",
    "doesn't match the broadcast shape",
    "Attention mask is not yet supported",
    "split it as the tokens are",
)
"""What the table quotes of errors."""


class Row(NamedTuple):
    """A model of the zoo, and how it is given its mask."""

    case: str
    mask: str


NONE, OWN_PART, WHOLE, BY_PLAN = "none", "each rank its own", "the whole", "split by the plan"
ROWS = (
    Row("flux", NONE),
    Row("flux", OWN_PART),
    Row("flux", WHOLE),
    Row("qwenimage", NONE),
    Row("qwenimage", BY_PLAN),
    Row("ltx", NONE),
    Row("ltx", BY_PLAN),
)

Verdicts = dict[tuple[Row, str, str], dict[Layout, str]]
"""Of each row, attention and mode: what became of each layout of padding."""


# --------------------------------------------------------------------------------- on every rank


def verdicts(rank: int) -> Verdicts:
    """What this rank finds, for all rows whose model takes these inputs in this diffusers."""
    found: Verdicts = {}
    for case in CASES:
        rows = [row for row in ROWS if row.case == case.name]
        one = case.build() if rows else None
        for attention in ("diffusers", "ours") if rows else ():
            for mode in MODES:
                model = case.build()
                plan = None
                if attention == "ours":
                    enable_fa3(model, kernel="reference", fallback="error")
                    plan = cp_plan(model)
                split(model, plan, **degrees(mode))
                for row in rows:
                    found[row, attention, mode] = {
                        layout: verdict(
                            case, model, inputs(case, row, layout, rank), case.run(one, layout)
                        )
                        for layout in case.layouts
                        if (layout == "none") == (row.mask == NONE)
                    }
    return found


def inputs(case: Case, row: Row, layout: Layout, rank: int) -> dict[str, Any]:
    """What this rank passes to the model, which splits tokens itself."""
    given = case.inputs(layout, 0.0)
    if row.mask == OWN_PART:
        text = given["encoder_hidden_states"].shape[1]
        mask = given["joint_attention_kwargs"]["attention_mask"]
        parts = [part.chunk(RANKS, -1)[rank] for part in (mask[..., :text], mask[..., text:])]
        given["joint_attention_kwargs"] = {"attention_mask": torch.cat(parts, -1)}
    return given


def verdict(case: Case, model: nn.Module, given: dict[str, Any], expected: torch.Tensor) -> str:
    """Equal to one process; or wrong, by what order of magnitude; or the words of the error."""
    try:
        with torch.no_grad():
            output = case.pick(model(**given, return_dict=False))
    except (ValueError, RuntimeError) as error:
        said = next((words for words in WORDS if words in str(error)), str(error))
        return f'raises "{said}"'
    largest = (output - expected).abs().max().item()
    if largest <= TOLERANCE:
        return EQUAL
    by = f"1e{math.floor(math.log10(largest))}" if math.isfinite(largest) else str(largest)
    return f"**wrong** by {by}"


# --------------------------------------------------------------------------------------- the table


def measured() -> Verdicts:
    """What the ranks found, who must agree; ours is equal where each has its part of the mask."""
    first, *others = results("test_upstream_parallel:verdicts", RANKS)
    assert all(other == first for other in others)
    for (row, attention, _), said in first.items():
        if attention == "ours" and row.mask != WHOLE:
            assert {*said.values()} == {EQUAL}, (row, said)
    return first


def table(found: Verdicts) -> str:
    """The table of the page."""
    head = ["model", "mask", *(f"diffusers, {word}" for word in MODES.values()), "this package"]
    body = []
    for row in ROWS:
        theirs = [cell(found[row, "diffusers", mode]) for mode in MODES]
        ours = {cell(found[row, "ours", mode]) for mode in MODES}
        body.append([f"`{row.case}`", row.mask, *theirs, " or ".join(sorted(ours))])
    return markdown([head, *body])


def cell(by_layout: dict[Layout, str]) -> str:
    """The verdicts of all layouts; which are which, if they differ."""
    layouts: dict[str, list[str]] = {}
    for layout, what in by_layout.items():
        layouts.setdefault(what, []).append(layout.replace("_", "-"))
    if len(layouts) == 1:
        return next(iter(layouts))
    return "; ".join(f"{', '.join(names)}: {what}" for what, names in layouts.items())


def around() -> tuple[str, str, str]:
    """The page up to the table, the table, and the rest."""
    before, after = PAGE.read_text().split(START)
    written, rest = after.split(END, 1)
    return before + START, written, END + rest


def test_the_table_of_diffusers_under_context_parallelism_is_as_measured() -> None:
    needs(host.TRIED[1], "does other things than the table of docs/several_gpus.md says")
    assert around()[1].strip() == table(measured()), "run `python tests/test_upstream_parallel.py`"


def test_the_oldest_diffusers_splits_no_call_with_a_mask() -> None:
    if has("0.37"):
        pytest.skip("some release after 0.36 began to take masks; the table has the newest")
    found = measured()
    for (row, attention, mode), said in found.items():
        if attention == "diffusers" and (row.mask != NONE or mode == "R2"):
            assert all(what.startswith("raises") for what in said.values()), (row, said)
        elif attention == "diffusers":
            assert {*said.values()} == {EQUAL}, (row, said)


if __name__ == "__main__":
    start, _, end = around()
    PAGE.write_text(f"{start}{table(measured())}\n{end}")
