"""The section's words: what `machine_report` knows of the model, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator

from diffusers_fa3.tools.card.markdown import code, escaped, table
from diffusers_fa3.tools.card.measured import parity_lines, speed_lines
from diffusers_fa3.tools.card.of_model import ParityOfModel, SpeedOfModel, named_groups
from diffusers_fa3.tools.info import MachineReport
from diffusers_fa3.tools.info.builds import KernelFacts
from diffusers_fa3.tools.info.model import Known, ModelFacts

LAYER_HEAD = ("layers", "number", "processor", "heads x size", "mask arguments")
KERNEL_HEAD = ("kernel", "install", "usable there")
PARITY, SPEED = "### Parity, measured", "### Speed, measured"
"""The headings of what is there only if its report is given."""


def section_of(
    report: MachineReport, name: str, parity: ParityOfModel | None, speed: SpeedOfModel | None
) -> list[str]:
    """The lines of the section; there is no paragraph for what was not measured.

    Args:
        report: with a model.
        name: of the model's folder.
        parity: of this model.
        speed: of calls of this model's sizes.
    """
    facts = report.model
    assert facts is not None
    parts = [
        ["## On FlashAttention-3"],
        [*_enable(facts, name)],
        ["### Coverage"],
        [*_coverage(facts)],
    ]
    if parity is not None:
        parts += [[PARITY], *parity_lines(parity)]
    if speed is not None:
        parts += [[SPEED], *speed_lines(speed)]
    parts += [
        ["### Kernels"],
        *_kernels(report, facts),
        ["### Limits"],
        [f"- {limit}" for limit in _limits(facts)],
        [f"Written by `diffusers-fa3 card`, diffusers_fa3 {escaped(report.diffusers_fa3)}."],
    ]
    lines = [line for part in parts if part for line in [*part, ""]]
    return lines[:-1]


def _enable(facts: ModelFacts, name: str) -> Iterator[str]:
    # In code nothing can be escaped by Markdown: Python's own escape keeps marks out.
    where = json.dumps(name).replace("<", "\\u003c")
    of_pipeline = _is_pipeline(facts)
    loader, variable = ("DiffusionPipeline", "pipe") if of_pipeline else (facts.model, "model")
    what = "pipeline" if of_pipeline else "model"
    yield f"The attention of this {what} can run on FlashAttention-3 kernels, by `diffusers_fa3`:"
    yield ""
    yield "```python"
    yield "import torch"
    yield f"from diffusers import {loader}"
    yield "from diffusers_fa3 import coverage, enable_fa3"
    yield ""
    yield f"{variable} = {loader}.from_pretrained({where}, torch_dtype=torch.bfloat16)"
    yield f'{variable}.to("cuda" if torch.cuda.is_available() else "cpu")'
    yield f"enable_fa3({variable})  # disable_fa3({variable}) switches back"
    yield f"print(coverage({variable}))  # after a run: the kernel of each layer's calls"
    yield "```"


def _coverage(facts: ModelFacts) -> Iterator[str]:
    rows = [
        (
            code(name),
            str(group.count),
            code(group.processor),
            f"{_or_unknown(group.heads)} x {_or_unknown(group.head_dim)}",
            ", ".join(map(code, group.masks)) or "none",
        )
        for name, group in named_groups(facts)
    ]
    if rows:
        yield f"The attention layers of {code(facts.model)} that `enable_fa3` finds, as configured:"
        yield ""
        yield from table(LAYER_HEAD, rows)
    else:
        yield f"`enable_fa3` finds no attention layer in {code(facts.model)}."


def _kernels(report: MachineReport, facts: ModelFacts) -> Iterator[list[str]]:
    gpu = report.machine.gpu
    where = f"torch {escaped(report.machine.torch)}, {escaped(gpu.name) if gpu else 'no GPU'}"
    yield [
        "The kernels that `diffusers_fa3` knows, and whether they were usable where this section "
        f"was written ({where}). `diffusers-fa3 info` tells it of another machine."
    ]
    rows = [(code(k.name), code(k.install), _usable(k)) for k in report.kernels]
    yield table(KERNEL_HEAD, rows)
    taken: dict[str, None] = dict.fromkeys(
        group.auto for _, group in named_groups(facts) if group.auto
    )
    if taken:
        yield [
            f'There, in bf16, `kernel="auto"` takes {", ".join(map(code, taken))} for layers of '
            "these sizes."
        ]


def _usable(kernel: KernelFacts) -> str:
    if not kernel.accepted:
        return "no"
    by_name = ", by name only" if kernel.only_by_name else ""
    return f"yes{by_name}: {escaped(kernel.version)}" if kernel.version else f"yes{by_name}"


def _limits(facts: ModelFacts) -> Iterator[str]:
    yield (
        "FlashAttention-3 itself needs a Hopper GPU (H100, H200) and bf16 or fp16. Without a "
        "kernel, a reference in plain PyTorch serves: not for speed."
    )
    yield (
        "The default attention serves calls with a mask that no kernel can express, with dropout, "
        "or with gradients that the kernel has not. `coverage` counts them, with the reason."
    )
    if _is_pipeline(facts):
        yield "Components that are not in the table, as the VAE, stay as they are."
    for name, group in named_groups(facts):
        if not group.calls:
            yield f"{code(name)}: no attention call is seen in {code(group.processor)}."
    for component in facts.components:
        who = code(component.name or component.model)
        if component.unswitchable:
            yield f"{who}, not switched: {escaped(component.unswitchable)}."
        yield f"{who}, split over several GPUs: {_known(component.context_parallel)}."
        yield f"{who}, `pack_queries=True`: {_known(component.pack_queries)}."
    for name, why in facts.skipped:
        yield f"{code(name)} could not be read: {escaped(why)}."


def _known(known: Known) -> str:
    if not known.known:
        return f"no: {escaped(known.reason)}"
    return "yes, by diffusers' own plan" if known.by == "diffusers" else "yes"


def _is_pipeline(facts: ModelFacts) -> bool:
    return not any(component.name == "" for component in facts.components)


def _or_unknown(number: int | None) -> str:
    return "?" if number is None else str(number)
