"""The tables of models in `docs/`: measured here, on every case and layout of the zoo.

`python tests/support.py` writes them there. `pytest` prints the table of routes at the end of a run
that measured it.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.models import attention_dispatch
from zoo import CASES, Case, Layout
from zoo.budget import budget, error
from zoo.watch import Log, watched

from diffusers_fa3 import coverage, enable_fa3, flash_attn_varlen_func

LAYOUTS: tuple[Layout, ...] = ("none", "all_true", "right", "left", "ragged", "gap")
BACKENDS = ("_flash_3", "_flash_varlen_3", "_flash_3_varlen_hub")


@functools.cache
def routes_table() -> str:
    """Which route each model takes with each layout of padding."""
    head = ["model", "case", *(layout.replace("_", "-") for layout in LAYOUTS), "not on a kernel"]
    return markdown([head, *(routes_row(case) for case in CASES)])


@functools.cache
def upstream_table() -> str:
    """What diffusers' backends make of the same masks, where they reach the model at all."""
    rows = []
    for case in CASES:
        layouts = [layout for layout in case.layouts if masked(case, layout)]
        if layouts:
            cells = [verdicts(case, layouts, backend) for backend in BACKENDS]
            rows.append([f"`{model_of(case)}`", f"`{case.name}`", *cells])
    return markdown([["model", "case", *(f"`{backend}`" for backend in BACKENDS)], *rows])


def upstream_summary_table() -> str:
    """How many of the cases of `upstream_table` each backend of diffusers gets right."""
    _, _, *rows = [line.strip("| ").split(" | ") for line in upstream_table().splitlines()]
    kinds = {
        "wrong": lambda cell: "wrong" in cell,
        "raises": lambda cell: "raises" in cell and "wrong" not in cell,
        "not reached": lambda cell: cell == "not reached",
        "equal": lambda cell: cell == "equal",
    }
    counted = [
        [f"`{backend}`", *(str(sum(map(kind, column))) for kind in kinds.values())]
        for backend, column in zip(BACKENDS, list(zip(*rows))[2:])
    ]
    return markdown([[f"of {len(rows)} cases", *kinds], *counted])


def model_of(case: Case) -> str:
    """The class of diffusers that a case is of."""
    return next(c.__name__ for c in case.model.__mro__ if c.__module__.startswith("diffusers."))


def routes_row(case: Case) -> list[str]:
    """The routes of one forward for each layout; and what was left to the default, and why."""
    cells, reasons = [], Counter[str]()
    for layout in LAYOUTS:
        found = Counter[str]()
        if layout in case.layouts:
            model = case.build()
            enable_fa3(model, kernel="reference", fallback="silent")
            case.run(model, layout)
            for row in coverage(model).rows:
                found.update(row.calls.keys())
                reasons.update(row.fallbacks)
        cells.append(", ".join(sorted(found)) or ("default" if layout in case.layouts else ""))
    outside = ["attention of a module without a processor"] if case.outside else []
    why = case.unreached or "; ".join([*outside, *sorted(reasons)])
    return [f"`{model_of(case)}`", f"`{case.name}`", *cells, why]


@functools.cache
def default(case: Case, layout: Layout) -> tuple[torch.Tensor, Log]:
    """The output of the default processors, and what they called."""
    with watched() as log:
        output = case.run(case.build(), layout)
    return output, log


def masked(case: Case, layout: Layout) -> bool:
    """Whether a forward hides keys from an attention call."""
    return default(case, layout)[1].hides


def verdicts(case: Case, layouts: list[Layout], backend: str) -> str:
    """What a backend of diffusers makes of each layout, the same verdicts together."""
    by_verdict: dict[str, list[str]] = {}
    for layout in layouts:
        by_verdict.setdefault(verdict(case, layout, backend), []).append(layout)
    if len(by_verdict) == 1:
        return next(iter(by_verdict))
    return "; ".join(f"{', '.join(names)}: {what}" for what, names in by_verdict.items())


def verdict(case: Case, layout: Layout, backend: str) -> str:
    """One forward on a backend of diffusers, with exact mathematics as its kernel."""
    expected, exact = default(case, layout)[0], case.exact(layout)
    model = case.build()
    for module in model.modules():
        if hasattr(getattr(module, "processor", None), "_attention_backend"):
            module.processor._attention_backend = backend
    with exact_kernels() as reached:
        try:
            output = case.run(model, layout)
        except (ValueError, RuntimeError):
            return "raises"
    if not reached:
        return "not reached"
    return "equal" if error(output, exact) <= budget(expected, exact) else "**wrong**"


@contextmanager
def exact_kernels() -> Iterator[list[str]]:
    """Exact mathematics in place of the CUDA kernels of diffusers' backends; lists their calls."""
    reached: list[str] = []

    def kernel(*args: object, **arguments: object) -> object:
        reached.append("call")
        return flash_attn_varlen_func(*args, **arguments, kernel="reference")

    hub = attention_dispatch._HUB_KERNELS_REGISTRY[
        attention_dispatch.AttentionBackendName._FLASH_3_VARLEN_HUB
    ]
    before = getattr(attention_dispatch, "flash_attn_3_varlen_func", None), hub.kernel_fn
    attention_dispatch.flash_attn_3_varlen_func = hub.kernel_fn = kernel
    try:
        yield reached
    finally:
        attention_dispatch.flash_attn_3_varlen_func, hub.kernel_fn = before


def markdown(rows: list[list[str]]) -> str:
    """A table whose first row is its head."""
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


TABLES = {
    "routes": routes_table,
    "upstream_summary": upstream_summary_table,
    "upstream": upstream_table,
}
DOCS = Path(__file__).parents[1] / "docs"
PAGES = {
    "routes": DOCS / "coverage.md",
    "upstream_summary": DOCS / "upstream.md",
    "upstream": DOCS / "upstream.md",
}
"""Where each table stands, between `<!-- table: NAME -->` and `<!-- /table -->`."""


def written_table(name: str) -> str:
    """A table as its page has it."""
    return _around(name)[1].strip()


def write_table(name: str, table: str) -> None:
    """Put a table in its place."""
    before, _, after = _around(name)
    PAGES[name].write_text(f"{before}{table}\n{after}")


def _around(name: str) -> tuple[str, str, str]:
    """The page of a table: up to its mark, the table, and from its end on."""
    mark, end = f"<!-- table: {name} -->\n", "<!-- /table -->"
    before, after = PAGES[name].read_text().split(mark)
    table, rest = after.split(end, 1)
    return before + mark, table, end + rest


def main() -> None:
    """Measure the tables and write them into their pages."""
    for name, measure in TABLES.items():
        write_table(name, measure())


if __name__ == "__main__":
    main()
