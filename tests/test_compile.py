"""torch.compile sees one op in place of a kernel: whole graphs, no recompilation, same numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from zoo import CASES, Case, Layout
from zoo.budget import assert_within_budget
from zoo.case import key_mask
from zoo.watch import watched

from diffusers_fa3 import FallbackWarning, attention, coverage, enable_fa3
from diffusers_fa3.ops import forward_into

BY_NAME = {case.name: case for case in CASES}
RUNS: list[tuple[str, Layout, str]] = [
    ("flux", "none", "dense"),
    ("flux", "gap", "static"),
    ("sd3", "none", "dense"),
    *([("qwenimage", "gap", "static")] if "qwenimage" in BY_NAME else []),
    ("prx", "ragged", "static"),
    ("pixart", "none", "dense"),
    ("unet_sd15", "none", "dense"),
    ("wan_t2v", "none", "dense"),
]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "layout", "route"), RUNS, ids=[f"{name}-{layout}" for name, layout, _ in RUNS]
)
def test_a_model_is_one_graph(name: str, layout: Layout, route: str) -> None:
    case = BY_NAME[name]
    default = case.run(case.build(), layout)
    model = case.build()
    enable_fa3(model, kernel="reference", fallback="error")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert_within_budget(case.run(compiled, layout), default, case.exact(layout))
    (row,) = (row for row in coverage(model).rows if row.name == "compiled graphs")
    with watched() as log:
        case.run(case.build(), layout)
    assert row.calls == {route: 2 * len(log.calls)}
    assert row.kernel == "reference"
    assert row.fallbacks == {}


def test_layers_steps_and_other_padding_share_one_compilation() -> None:
    case: Case = BY_NAME["flux"]
    model = case.build()
    enable_fa3(model, kernel="reference", fallback="error")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for layout in ("right", "ragged", "gap", "left", "right"):
        output = case.run(compiled, layout)
        assert_within_budget(output, case.run(case.build(), layout), case.exact(layout))
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_inductor_generates_code_around_the_op() -> None:
    def block(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        return attention(q * 2, k, v, mask, kernel="reference") + 1

    q, k, v = torch.randn(3, 2, 12, 2, 16)
    for layout in ("ragged", "gap"):
        mask = key_mask(layout)
        compiled = torch.compile(block, fullgraph=True)
        torch.testing.assert_close(compiled(q, k, v, mask), block(q, k, v, mask))


def test_layers_compiled_one_by_one_share_one_compilation() -> None:
    case = replace(BY_NAME["flux"], config={**BY_NAME["flux"].config, "num_layers": 3})
    model = case.build()
    enable_fa3(model, kernel="reference", fallback="error")
    default = case.run(case.build(), "gap")
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.transformer_blocks:
        block.compile(backend=counter, fullgraph=True)
    assert_within_budget(case.run(model, "gap"), default, case.exact("gap"))
    assert counter.frame_count == 1


def test_a_mask_that_would_have_to_be_read_is_compiled_as_the_default_attention() -> None:
    case = BY_NAME["pixart"]
    model = case.build()
    enable_fa3(model, kernel="reference")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.warns(FallbackWarning, match="compiled as the default attention: additive mask"):
        output = case.run(compiled, "ragged")
    assert_within_budget(output, case.run(case.build(), "ragged"), case.exact("ragged"))
    (row,) = (row for row in coverage(model).rows if row.name == "compiled graphs")
    assert list(row.calls) == ["dense"]
    assert sum(row.fallbacks.values()) == 2


# diffusers 0.36 about itself, in torch 2.9
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_gradients_go_to_the_default_attention_with_that_reason() -> None:
    case = BY_NAME["flux"]
    model, plain = case.build(), case.build()
    enable_fa3(model, kernel="reference", fallback="silent")
    compiled = torch.compile(model, backend="aot_eager")
    inputs = case.inputs("none", 0.0)
    for module in (compiled, plain):
        module(**inputs, return_dict=False)[0].square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)
    reasons = {reason for row in coverage(model).rows for reason in row.fallbacks}
    assert reasons == {"gradients under torch.compile"}


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_op_keeps_the_rules_of_torch_library(packed: bool, return_lse: bool) -> None:
    q, k, v = torch.randn(3, 2, 6, 4, 8)
    ends = None
    if packed:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    arguments = (
        *(q, k, v, torch.empty_like(q), "reference", 0.3, False, -1, -1),
        *(ends, ends, None, 7, 7, 0, return_lse),
    )
    torch.library.opcheck(forward_into, arguments)
