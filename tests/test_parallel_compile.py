"""torch.compile of models that are split over ranks: one graph, exact, masks read in no graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from published_models import MODELS, build, forward_of, made_small, make_inputs
from ranks import degrees, known, results, split
from test_parallel_models import OWN, output, own_part
from torch._dynamo.utils import counters
from torch.torch_version import TorchVersion
from zoo import Case, Layout

from diffusers_fa3 import FallbackWarning, coverage, cp_plan, enable_fa3

FLUX: Case = next(case for case in OWN if case.name == "flux")
LAYOUTS: tuple[Layout, ...] = ("none", "ragged")
WHOLE = TorchVersion(torch.__version__) >= "2.13"
"""Before torch 2.13, Dynamo skips a function in the gather by which diffusers ends a forward."""


def compiled(
    rank: int, modes: tuple[str, ...], before: bool
) -> dict[tuple[str, str], tuple[float, dict[str, int]]]:
    """The error of each compiled call, and its calls on a kernel by route."""
    found = {}
    for mode in modes:
        for layout in LAYOUTS:
            torch._dynamo.reset()
            expected = output(FLUX, FLUX.build(), layout)
            model = FLUX.build()
            if before:
                enable_fa3(model, kernel="reference", fallback="error")
            split(model, **degrees(mode))
            if not before:
                enable_fa3(model, kernel="reference", fallback="error")
            graph: Any = model
            if WHOLE:
                graph = torch.compile(model, fullgraph=True, backend="aot_eager")
            else:
                model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
            with torch.no_grad():
                for _ in range(2):
                    inputs = own_part(FLUX.inputs(layout, 0.0))
                    got = FLUX.pick(graph(**inputs, return_dict=False))
            error = (got - expected).abs().max().item()
            calls = {key: n for row in coverage(model).rows for key, n in row.calls.items()}
            found[mode, layout] = (error, calls)
    return found


def check(world: int, modes: tuple[str, ...], before: bool) -> None:
    modes = known(modes)
    for found in results("test_parallel_compile:compiled", world, modes, before):
        assert len(found) == len(modes) * len(LAYOUTS)
        for (mode, layout), (error, calls) in found.items():
            assert error < 1e-6, (mode, layout)
            route = "dense" if layout == "none" else "static"
            assert calls == {route: 4}, (mode, layout)  # 2 layers, twice


@pytest.mark.parametrize(
    "before", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["enabled before", "after"]
)
def test_compiled_models_are_as_on_one_process(before: bool) -> None:
    check(2, ("U2", "R2"), before)


@pytest.mark.slow
def test_a_compiled_unified_split_is_as_on_one_process() -> None:
    check(4, ("U2R2",), True)


def uneven(rank: int) -> list[str]:
    said = []
    for mode in known(("UA2", "RA2")):
        torch._dynamo.reset()
        model = split(FLUX.build(), **degrees(mode))
        enable_fa3(model, kernel="reference", fallback="silent")
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        try:
            output(FLUX, model, "none")
            said.append("served")
        except Exception as error:  # Dynamo's own, which quotes the one that it met
            said.append(str(error))
    return said


def test_lengths_that_ranks_tell_each_other_are_refused_in_a_graph() -> None:
    for said in results("test_parallel_compile:uneven", 2):
        for words in said:
            assert "ulysses_anything and ring_anything under torch.compile" in words, words


def graphs(rank: int, names: tuple[str, ...]) -> dict[str, list[int]]:
    """How many graphs it takes to compile the blocks of models of 3 and of 4 layers."""
    found: dict[str, list[int]] = {}
    for name in names:
        for layers in (3, 4):
            torch._dynamo.reset()
            counters.clear()
            small = made_small(next(model for model in MODELS if model.name == name))
            depths = dict.fromkeys(small.depths, layers)
            size = replace(small.size, text=40)
            small = replace(small, config=small.config | depths, size=size)
            model: Any = build(small, "cpu")
            model._repeated_blocks = model._repeated_blocks or ["JointTransformerBlock"]
            enable_fa3(model, kernel="reference", fallback="error")
            split(model, cp_plan(model), ring_degree=2)
            model.compile_repeated_blocks(fullgraph=True, backend="eager")
            with torch.no_grad():
                forward_of(model)(make_inputs(small, None, "cpu"))
            found.setdefault(name, []).append(counters["stats"]["unique_graphs"])
    return found


@pytest.mark.slow
def test_layers_share_their_graphs() -> None:
    names = ("flux", "sd3")  # the processors of SD3 call PyTorch's attention
    for found in results("test_parallel_compile:graphs", 2, names):
        assert all(of_3 == of_4 > 0 for of_3, of_4 in found.values()), found


def trained(rank: int) -> list[float]:
    """Gradients of parameters of compiled models, summed over ranks, against one process."""
    errors = []
    for mode in ("U2", "R2"):
        torch._dynamo.reset()
        whole = FLUX.build()
        whole(**FLUX.inputs("ragged", 0.0), return_dict=False)[0].square().sum().backward()
        model = FLUX.build()
        enable_fa3(model, kernel="reference", fallback="silent")
        split(model, **degrees(mode))
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        inputs = own_part(FLUX.inputs("ragged", 0.0))
        model(**inputs, return_dict=False)[0].square().sum().backward()
        errors.append(parameter_error(model, whole))
    return errors


def parameter_error(model: torch.nn.Module, whole: torch.nn.Module) -> float:
    """The worst relative error of a parameter's gradient, summed over ranks."""
    worst = 0.0
    for ours, theirs in zip(model.parameters(), whole.parameters()):
        if theirs.grad is None:
            continue
        total = torch.zeros_like(theirs) if ours.grad is None else ours.grad.clone()
        torch.distributed.all_reduce(total)
        error = (total - theirs.grad).norm() / theirs.grad.norm().clamp_min(1e-6)
        worst = max(worst, error.item())
    return worst


@pytest.mark.slow
@pytest.mark.filterwarnings(f"ignore::{FallbackWarning.__module__}.FallbackWarning")
def test_gradients_of_compiled_models_are_those_of_one_process() -> None:
    for errors in results("test_parallel_compile:trained", 2):
        assert max(errors) < 1e-5
