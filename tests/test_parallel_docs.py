"""Which models can be split over ranks, and why others cannot: two tables of `docs/coverage.md`.

`python tests/test_parallel_docs.py` writes them there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import split_image
import split_video
from releases import has
from support import markdown, model_of
from zoo import CASES, Case

from diffusers_fa3.layers import host
from diffusers_fa3.parallel.plans import PLANS, WHY_NOT

PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"

NONE, WHOLE, OWN_PART, REFUSED = "none", "as on one process", "each rank its own part", "refused"
PASSED_ON = frozenset({"FluxTransformer2DModel", "Flux2Transformer2DModel"})
"""Classes that hand a caller's mask to their layers as it is: no plan splits it, and none of ours
knows the order of all tokens."""

KNOWN: dict[str, list[Case]] = {}
"""The cases of each class, as far as the installed diffusers has it."""
for known in CASES:
    KNOWN.setdefault(model_of(known), []).append(known)


def plans_table() -> str:
    """By whose plan each class is split, and what that asks of a caller."""
    head = ["model", "plan", "masks that each rank passes", "gradients"]
    return markdown([head, *(plans_row(name) for name in sorted(KNOWN) if whose(name))])


def plans_row(name: str) -> list[str]:
    """The row of one class."""
    trains = name not in PLANS or PLANS[name].trains
    return [f"`{name}`", whose(name), masks(name), "yes" if trains else REFUSED]


def whose(name: str) -> str:
    """Who has the plan of a class; empty if nobody has one."""
    if name in PLANS:
        return "ours"
    return "diffusers'" if KNOWN[name][0].model._cp_plan is not None else ""


def masks(name: str) -> str:
    """What mask a rank passes to a model of a class, as the cases of the zoo are run on ranks."""
    refused = {*split_image.REFUSED, *split_video.REFUSED}
    masked = [(c.name, layout) for c in KNOWN[name] for layout in c.layouts if layout != "none"]
    if not masked:
        return NONE
    if all({case, f"{case}/{layout}"} & refused for case, layout in masked):
        return REFUSED
    return OWN_PART if name in PASSED_ON else WHOLE


def no_plans_table() -> str:
    """Why each of the other classes cannot be split."""
    rows = [[f"`{name}`", reason] for name, reason in sorted(WHY_NOT.items())]
    return markdown([["model", "why it has no plan"], *rows])


TABLES: dict[str, Callable[[], str]] = {"plans": plans_table, "no_plans": no_plans_table}


def around(name: str) -> tuple[str, str, str]:
    """The page up to a table, the table, and the rest."""
    mark, end = f"<!-- table: {name} -->\n", "<!-- /table -->"
    before, after = PAGE.read_text().split(mark)
    written, rest = after.split(end, 1)
    return before + mark, written.strip(), end + rest


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_plans_are_as_the_plans_are(name: str) -> None:
    said, found = around(name)[1], TABLES[name]()
    if has(host.TRIED[1]):
        assert said == found, "run `python tests/test_parallel_docs.py`"
    else:  # fewer models, with the same plans
        assert {*said.splitlines()} >= {*found.splitlines()}


def test_no_class_has_both_a_plan_and_a_reason() -> None:
    assert not PLANS.keys() & WHY_NOT.keys()
    assert not [name for name in WHY_NOT.keys() & KNOWN.keys() if whose(name)]


if __name__ == "__main__":
    for title, make in TABLES.items():
        start, _, end = around(title)
        PAGE.write_text(f"{start}{make()}\n{end}")
