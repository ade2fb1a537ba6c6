"""The report in words and tables: plain text, or by rich where that is installed."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from diffusers_fa3.tools.info.builds import KernelFacts
from diffusers_fa3.tools.info.choices import Choice
from diffusers_fa3.tools.info.machine import MachineFacts
from diffusers_fa3.tools.info.model import ComponentFacts, Known, ModelFacts
from diffusers_fa3.tools.info.report import MachineReport

WIDTH = 100


@dataclass(frozen=True)
class Section:
    """A title, a table and lines below it; each may be empty."""

    title: str
    rows: list[tuple[str, ...]] = field(default_factory=list)
    """The first is the head; a head of empty strings is not shown."""
    lines: list[str] = field(default_factory=list)
    """With a command behind a line break, where there is one."""


def sections(report: MachineReport) -> Iterator[Section]:
    """The parts of a report, in the order in which they are shown."""
    yield Section("machine", [("", ""), *_machine_rows(report.machine, report.diffusers_fa3)])
    yield _kernels(report.kernels)
    if report.probes is not None:
        rows = [
            (probe.kernel, step.step, step.outcome, step.detail)
            for probe in report.probes
            for step in probe.steps
        ]
        yield Section("probe: each kernel in a process of its own", [PROBE_HEAD, *rows])
    yield Section('what "auto" takes', [CHOICE_HEAD, *_choice_rows(report.choices)])
    if report.model is not None:
        yield from _model(report.model)
    yield Section("what to do", lines=[_item(a.text, a.command) for a in report.advice])
    seen = [_item(conflict.text, conflict.command) for conflict in report.conflicts]
    yield Section("conflicts", lines=seen or ["none seen"])


PROBE_HEAD = ("kernel", "step", "outcome", "")
CHOICE_HEAD = ("dtype", "calls", "head sizes", "kernel")
KERNEL_HEAD = (
    *("kernel", "usable", "version", "dtypes", "head sizes"),
    *("window", "softcap", "float8", "backward", "out", "LSE"),
)
LAYER_HEAD = ("layers", "", "processor", "heads", "size", "mask", "calls", "auto, bf16")


def plain(report: MachineReport) -> str:
    """The report as plain text."""
    return "\n\n".join(map(_plain_section, sections(report)))


def show(report: MachineReport) -> None:
    """Print the report, by rich if it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        print(plain(report))
        return
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:  # a file has no width to break tables at
        print(plain(report))
        return
    for section in sections(report):
        console.print(f"\n{section.title}", style="bold")
        if section.rows:
            head, *rows = section.rows
            table = Table(show_header=any(head), box=None, pad_edge=False)
            for name in head:
                table.add_column(name, overflow="fold")
            for row in rows:
                table.add_row(*row)
            console.print(table)
        for line in section.lines:
            console.print(line)


def _plain_section(section: Section) -> str:
    lines = [section.title]
    rows = section.rows if any(section.rows[:1] and section.rows[0]) else section.rows[1:]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths))
        lines.append(f"  {'  '.join(cells)}".rstrip())
    for line in section.lines:
        text, *command = line.split("\n")
        lines += textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
        lines += command
    return "\n".join(lines)


def _item(text: str, command: str) -> str:
    return f"{text}\n      {command}" if command else text


def _machine_rows(machine: MachineFacts, own: str) -> Iterator[tuple[str, str]]:
    gpus = [
        f"{gpu.name}, compute capability {gpu.capability[0]}.{gpu.capability[1]}, "
        f"{gpu.memory_gib:g} GiB"
        for gpu in machine.gpus
    ]
    yield from (("GPU", gpu) for gpu in gpus or ["none that torch can use"])
    built = f"for CUDA {machine.cuda}" if machine.cuda else "without CUDA"
    built = f"for ROCm {machine.rocm}" if machine.rocm else built
    yield "driver", machine.driver or "none"
    yield "torch", f"{machine.torch}, built {built}"
    yield "cuDNN", str(machine.cudnn) if machine.cudnn else "none"
    yield "C++ ABI", "cxx11" if machine.cxx11_abi else "before cxx11"
    yield "Python", machine.python
    yield "platform", " ".join(filter(None, (machine.platform, machine.libc)))
    yield "diffusers-fa3", own
    yield from machine.packages
    yield from machine.variables


def _kernels(kernels: Sequence[KernelFacts]) -> Section:
    reasons: dict[str, list[str]] = {}
    for kernel in kernels:
        if not kernel.accepted:
            reasons.setdefault("; ".join(kernel.reasons), []).append(kernel.name)
    lines = [f"{', '.join(names)}: {why}" for why, names in reasons.items()]
    lines += [
        f"{kernel.name} is built without {', '.join(kernel.disabled)}"
        for kernel in kernels
        if kernel.disabled
    ]
    return Section("kernels", [KERNEL_HEAD, *map(_kernel_row, kernels)], lines)


def _kernel_row(kernel: KernelFacts) -> tuple[str, ...]:
    build = kernel.build
    usable = "by name" if kernel.accepted and kernel.only_by_name else _yes(kernel.accepted)
    if build is None:
        return (kernel.name, usable, kernel.version or "-", *["-"] * 8)
    largest = "any" if build.max_head_dim > 2**20 else f"to {build.max_head_dim}"
    multiple = f" by {build.head_dim_multiple}" if build.head_dim_multiple > 1 else ""
    short = (
        d.replace("bfloat", "bf").replace("float8_", "").replace("float", "fp")
        for d in build.dtypes
    )
    return (
        kernel.name,
        usable,
        kernel.version or "-",
        " ".join(short),
        f"{largest}{multiple}",
        *map(_yes, (build.window, build.softcap, build.float8, build.backward)),
        build.out,
        _yes(build.lse),
    )


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


def _choice_rows(choices: Sequence[Choice]) -> Iterator[tuple[str, ...]]:
    """Calls that get the same kernel at the same head sizes are one row."""
    kinds: dict[tuple[str, tuple[tuple[str, str], ...]], list[str]] = {}
    for (dtype, training, masked), group in itertools.groupby(
        choices, lambda c: (c.dtype, c.training, c.masked)
    ):
        words = f"{'training' if training else 'forward'}{', masked' if masked else ''}"
        kinds.setdefault((dtype, tuple(_by_kernel(list(group)))), []).append(words)
    for (dtype, answers), calls in kinds.items():
        every = "all" if len(calls) == 4 else " and ".join(calls)
        for sizes, kernel in answers:
            yield dtype, every, sizes, kernel
    if not choices:
        yield "?", "all", "all", "not asked: see what to do"


def _by_kernel(choices: Sequence[Choice]) -> Iterator[tuple[str, str]]:
    """(head sizes, kernel), with neighbouring sizes together."""
    for kernel, run in itertools.groupby(choices, lambda choice: choice.kernel):
        sizes = [choice.head_dim for choice in run]
        words = f"{sizes[0]} to {sizes[-1]}" if sizes[1:] else str(sizes[0])
        yield words, kernel or "none: PyTorch's attention"


def _model(facts: ModelFacts) -> Iterator[Section]:
    for component in facts.components:
        title = f"{component.name}: {component.model}" if component.name else component.model
        rows = [
            (
                group.layers,
                f"x{group.count}",
                group.processor,
                "?" if group.heads is None else str(group.heads),
                "?" if group.head_dim is None else str(group.head_dim),
                ", ".join(group.masks) or "none",
                ", ".join(group.calls) or "none seen",
                group.auto or "-",
            )
            for group in component.layers
        ]
        yield Section(f"model {title}", [LAYER_HEAD, *rows], list(_component_lines(component)))
    lines = [f"{name} is left out: {why}" for name, why in facts.skipped]
    if not facts.components:
        lines.append(f"{facts.model} has no attention layer that enable_fa3 would switch")
    if lines:
        yield Section(f"model {facts.model}", lines=lines)


def _component_lines(component: ComponentFacts) -> Iterator[str]:
    masks = ", ".join(component.masks)
    yield f"masks that its forward takes: {masks or 'none'}"
    yield f"pack_queries: {_known(component.pack_queries)}"
    yield f"several GPUs (cp_plan): {_known(component.context_parallel)}"
    if component.unswitchable:
        yield f"not switched: {component.unswitchable}"


def _known(known: Known) -> str:
    whose = {"diffusers": "yes, diffusers' own plan", "diffusers_fa3": "yes"}
    return whose.get(known.by, "yes") if known.known else f"no: {known.reason}"
