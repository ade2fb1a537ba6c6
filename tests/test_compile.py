"""torch.compile and torch.export see one op in place of a kernel, and no read of a mask.

Whole models: `test_compile_models.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from zoo import CASES
from zoo.budget import assert_within_budget
from zoo.case import BATCH, TEXT, key_mask

from diffusers_fa3 import FallbackWarning, attention, coverage, enable_fa3, plan_packing
from diffusers_fa3.kernels.compiled import forward_into
from diffusers_fa3.kernels.installed import kernel_named
from diffusers_fa3.options import Lengths

BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_inductor_generates_code_around_the_op() -> None:
    def block(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attention(q * 2, k, v, mask, kernel="reference") + 1

    q, k, v = torch.randn(3, 2, 12, 2, 16)
    for layout in ("ragged", "gap"):
        mask = key_mask(layout)
        compiled = torch.compile(block, fullgraph=True)
        torch.testing.assert_close(compiled(q, k, v, mask), block(q, k, v, mask))


def test_a_head_size_that_becomes_dynamic_is_traced_as_it_is() -> None:
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    mask = key_mask("gap")
    for head_dim in (16, 8, 32):
        q, k, v = torch.randn(3, *mask.shape, 2, head_dim)
        out = compiled(q, k, v, mask, kernel="reference")
        torch.testing.assert_close(out, attention(q, k, v, mask, kernel="reference"))


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


# diffusers 0.36 causes this warning itself, in torch 2.9
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


class Masked(nn.Module):
    """The call as a module, since only modules can be exported."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attention(q, k, v, mask, kernel="reference")


READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


@pytest.mark.parametrize("any_size", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_the_static_route_reads_nothing_and_serves_every_mask(strict: bool, any_size: bool) -> None:
    q, k, v = torch.randn(3, BATCH, TEXT, 2, 16)
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(
        Masked(),
        (q, k, v, key_mask("gap")),
        dynamic_shapes=(sizes,) * 4 if any_size else None,
        strict=strict,
    )
    nodes = exported.graph.nodes
    assert torch.ops.diffusers_fa3.forward_into.default in [node.target for node in nodes]
    for node in nodes:
        assert not READS.intersection(getattr(node.target, "tags", ())), node
        assert not free_unbacked_symbols([node.meta.get("val")]), node

    serve = exported.module()
    for layout in ("gap", "right", "ragged", "left", "all_true"):
        mask = key_mask(layout)
        torch.testing.assert_close(serve(q, k, v, mask), Masked()(q, k, v, mask))
    if any_size:
        q, k, v = torch.randn(3, 3, 7, 2, 16)
        mask = torch.arange(21).view(3, 7) % 4 > 1
        torch.testing.assert_close(serve(q, k, v, mask), Masked()(q, k, v, mask))


class Planned(nn.Module):
    """The same call with a plan of route seqused, which is a constant of the graph."""

    plan = plan_packing(key_mask("ragged"), batch=BATCH, q_len=TEXT, k_len=TEXT)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, self.plan, kernel="reference")


@pytest.mark.parametrize("reads", [False, True])
def test_a_graph_replaces_values_of_padding_for_a_kernel_that_reads_them(
    reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = replace(kernel_named("reference").limits, reads_padding=reads)
    monkeypatch.setitem(vars(kernel_named("reference")), "limits", known)
    q, k, v = torch.randn(3, BATCH, TEXT, 2, 16)
    exported = torch.export.export(Planned(), (q, k, v))
    taken = [n for n in exported.graph.nodes if n.target is torch.ops.aten.index_select.default]
    assert len(taken) == reads
    torch.testing.assert_close(exported.module()(q, k, v), Planned()(q, k, v))


PACKED = {"ends": torch.tensor([0, 5, 12], dtype=torch.int32)}
FORMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "causal": {"causal": True},
    "window": {"window": (3, 1)},
    "static": {"seqused_k": torch.tensor([4, 0], dtype=torch.int32)},
    "packed": PACKED,
    "packed-causal": {**PACKED, "causal": True},
    "packed-window": {**PACKED, "window": (3, 1)},
}
"""The op's arguments besides q, k and v; `ends` is the `cu_seqlens` of queries and of keys."""


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_op_keeps_the_rules_of_torch_library(form: str, return_lse: bool) -> None:
    options = FORMS[form]
    q, k, v = torch.randn(2, 6, 4, 8), *torch.randn(2, 2, 6, 2, 8)
    ends = options.get("ends")
    if ends is not None:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    longest = None if ends is None else 7
    arguments = (
        *(q, k, v, torch.empty_like(q), return_lse, "reference", 0),
        *(0.3, options.get("causal", False), *options.get("window", (-1, -1))),
        *Lengths(ends, ends, longest, longest, options.get("seqused_k")),
    )
    torch.library.opcheck(forward_into, arguments)
