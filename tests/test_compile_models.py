"""Whole models under torch.compile: one graph for all layers, steps, paddings and sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from switching import BY_NAME
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.nn import functional as F
from zoo import Case, Layout
from zoo.budget import assert_within_budget
from zoo.case import BATCH, TEXT, Inputs, randn
from zoo.watch import watched

from diffusers_fa3 import coverage, enable_fa3

RUNS: list[tuple[str, Layout, str]] = [
    ("flux", "none", "dense"),
    ("flux", "gap", "static"),
    ("sd3", "none", "dense"),
    ("qwenimage", "gap", "static"),
    ("prx", "ragged", "static"),
    ("pixart", "none", "dense"),
    ("unet_sd15", "none", "dense"),
    ("wan_t2v", "none", "dense"),
]
PADDED: tuple[Layout, ...] = ("gap", "right", "ragged", "left", "all_true")
SMALL_UNET = {
    "block_out_channels": (80,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("CrossAttnUpBlock2D",),
}
"""A UNet with a third of the code to generate."""


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


class Graphs(CompileCounterWithBackend):
    """A backend that counts its graphs, and asserts that none reads a tensor while it runs.

    `fullgraph` alone would allow sizes that depend on a tensor's values.
    """

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        for node in graph.graph.nodes:
            assert not free_unbacked_symbols([node.meta.get("example_value")]), node
        return super().__call__(graph, inputs)


def of(name: str, **config: Any) -> Case:
    """A case of the zoo, with some of its configuration changed."""
    case = BY_NAME[name]
    return replace(case, config={**case.config, **config})


def at(case: Case, share: float) -> Case:
    """The case in another step: its timestep is multiplied by `share`."""

    def inputs(layout: Layout, pads: float) -> Inputs:
        given = case.inputs(layout, pads)
        return {**given, "timestep": given["timestep"] * share}

    return replace(case, inputs=inputs)


def sized(case: Case, height: int, width: int, mark: Callable[[Tensor, int], None]) -> Case:
    """The case with an image of another size; `mark` is called on each axis that varies with it."""

    def inputs(layout: Layout, pads: float) -> Inputs:
        given = case.inputs(layout, pads)
        if case.name == "flux":
            tokens = height * width
            axes = (torch.arange(float(n)) for n in (1, height, width))
            mask = given["joint_attention_kwargs"]["attention_mask"][..., :TEXT]
            mask = F.pad(mask, (0, tokens), value=True)
            image, places = randn(BATCH, tokens, 4), torch.cartesian_prod(*axes)
            for tensor, axis in ((image, 1), (places, 0), (mask, 3)):
                mark(tensor, axis)
            resized = {"hidden_states": image, "img_ids": places}
            return {**given, **resized, "joint_attention_kwargs": {"attention_mask": mask}}

        name = "sample" if "sample" in given else "hidden_states"
        image = randn(*given[name].shape[:-2], height, width)
        for axis in (image.ndim - 2, image.ndim - 1):
            mark(image, axis)
        return {**given, name: image}

    return replace(case, inputs=inputs)


def switched(case: Case) -> nn.Module:
    model = case.build()
    enable_fa3(model, kernel="reference", fallback="error")
    return model


def assert_equal_to_eager(compiled: nn.Module, case: Case, layout: Layout) -> None:
    default = case.run(case.build(), layout)
    assert_within_budget(case.run(compiled, layout), default, case.exact(layout))


@pytest.mark.parametrize(
    ("name", "layout", "route"), RUNS, ids=[f"{name}-{layout}" for name, layout, _ in RUNS]
)
def test_a_model_is_one_graph_in_every_step(name: str, layout: Layout, route: str) -> None:
    case = of(name)
    model = switched(case)
    graphs = Graphs("aot_eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for step in (case, at(case, 0.5), at(case, 0.1)):
        assert_equal_to_eager(compiled, step, layout)
    assert graphs.frame_count == 1
    (row,) = (row for row in coverage(model).rows if row.name == "compiled graphs")
    with watched() as log:
        case.run(case.build(), layout)
    assert row.calls == {route: 3 * len(log.calls)}
    assert row.kernel == "reference"
    assert row.fallbacks == {}


@pytest.mark.parametrize("name", ["flux", "qwenimage"])
def test_layers_steps_and_other_padding_share_one_compilation(name: str) -> None:
    case = of(name, num_layers=2)
    graphs = Graphs("aot_eager")
    compiled = torch.compile(switched(case), backend=graphs, fullgraph=True)
    for share, layout in zip((1.0, 0.7, 0.4, 0.1, 0.4), PADDED):
        assert_equal_to_eager(compiled, at(case, share), layout)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("name", ["flux", "qwenimage"])
def test_layers_compiled_one_by_one_share_one_compilation(name: str) -> None:
    case = of(name, num_layers=3)
    model = switched(case)
    graphs = Graphs("aot_eager")
    for block in model.transformer_blocks:
        block.compile(backend=graphs, fullgraph=True)
    for share, layout in ((1.0, "gap"), (0.5, "ragged"), (0.1, "left")):
        assert_equal_to_eager(model, at(case, share), layout)
    assert graphs.frame_count == 1


@pytest.mark.slow
# Generating code takes long; in this process and without vectors, it takes a third less.
@inductor.patch({"compile_threads": 1, "cpp.simdlen": 1})
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "config", "layouts"),
    [
        ("qwenimage", {}, PADDED),
        pytest.param("unet_sd15", SMALL_UNET, ("none", "none"), marks=pytest.mark.exhaustive),
    ],
    ids=["qwenimage", "unet_sd15"],
)
def test_inductor_generates_a_whole_model_once(
    name: str, config: dict[str, Any], layouts: tuple[Layout, ...]
) -> None:
    case = of(name, **config)
    graphs = Graphs("inductor")
    compiled = torch.compile(switched(case), backend=graphs, fullgraph=True)
    for share, layout in zip((1.0, 0.7, 0.4, 0.1, 0.4), layouts):
        assert_equal_to_eager(compiled, at(case, share), layout)
    assert graphs.frame_count == 1


def compilations(case: Case, layout: Layout, mark: Callable[[Tensor, int], None]) -> list[int]:
    """The number of compilations after each of four sizes; each output is checked."""
    graphs, counts = Graphs("aot_eager"), []
    compiled = torch.compile(switched(case), backend=graphs, fullgraph=True)
    for height, width in ((4, 6), (6, 10), (14, 8), (8, 18)):
        assert_equal_to_eager(compiled, sized(case, height, width, mark), layout)
        counts.append(graphs.frame_count)
    return counts


def test_from_the_second_size_on_all_sizes_share_one_compilation() -> None:
    assert compilations(of("wan_t2v"), "none", mark=lambda *_: None) == [1, 2, 2, 2]


@pytest.mark.parametrize(
    ("name", "config", "layout"),
    [("flux", {}, "gap"), ("unet_sd15", SMALL_UNET, "none")],
    ids=["flux", "unet_sd15"],
)
def test_sizes_marked_as_dynamic_share_one_compilation(
    name: str, config: dict[str, Any], layout: Layout
) -> None:
    marked = torch._dynamo.mark_dynamic
    assert compilations(of(name, **config), layout, marked) == [1, 1, 1, 1]


# diffusers 0.36 causes this warning itself, in torch 2.9
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_a_processor_with_all_sizes_dynamic_is_traced_no_more_often_than_by_default() -> None:
    traced = []
    for model in (of("flux").build(), switched(of("flux"))):
        torch._dynamo.reset()
        graphs = Graphs("aot_eager")
        layer = model.transformer_blocks[0].attn
        compiled = torch.compile(layer, backend=graphs, fullgraph=True, dynamic=True)
        with torch.no_grad():
            compiled(randn(BATCH, 24, 256), randn(BATCH, TEXT, 256))
        traced.append(graphs.frame_count)
    assert traced[1] <= traced[0]
