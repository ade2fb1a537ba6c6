"""A plan lives for one forward: whatever changed the mask since, the next forward reads it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from ranks import results
from torch import Tensor, nn
from zoo import CASES

from diffusers_fa3 import FA3AttnProcessor, attention, coverage, enable_fa3
from diffusers_fa3.layers.frame import running
from diffusers_fa3.masks import PlanCache

BY_NAME = {case.name: case for case in CASES}
MASKED = [name for name in ("flux", "qwenimage", "pixart", "chroma") if name in BY_NAME]


def by_numpy(mask: Tensor) -> None:
    mask.numpy()[..., 1] = 0


def by_data(mask: Tensor) -> None:
    mask.data[..., 1] = 0


EDITS = [by_numpy, by_data]


def masks_of(inputs: dict[str, object]) -> list[Tensor]:
    nested = inputs.get("joint_attention_kwargs") or {}
    named = {**inputs, **nested}
    return [x for name, x in named.items() if "mask" in name and isinstance(x, Tensor)]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", MASKED)
def test_an_edit_unseen_by_pytorch_is_seen_by_the_next_forward(
    name: str, mode: Callable[[], object], edit: Callable[[Tensor], None]
) -> None:
    case = BY_NAME[name]
    with mode():
        inputs = case.inputs("ragged", 0.0)
        switched, default = case.build(), case.build()
        enable_fa3(switched, kernel="reference", fallback="error")
        first = switched(**inputs)[0]
        for mask in masks_of(inputs):
            versions = None if mask.is_inference() else mask._version
            edit(mask)
            assert versions is None or mask._version == versions
        second, expected = switched(**inputs)[0], default(**inputs)[0]
    torch.testing.assert_close(second, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(first, second, atol=1e-5)


def layers(count: int, wrap: Callable[[int], object]) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(
        Attention(query_dim=8, heads=2, dim_head=4, processor=wrap(i)) for i in range(count)
    )


def run(stack: nn.ModuleList, x: Tensor, mask: Tensor) -> Tensor:
    for layer in stack:
        x = layer(x, attention_mask=mask)
    return x


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_layers_that_share_one_wrapped_processor_share_a_plan(
    mode: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `unet.set_attn_processor(FA3AttnProcessor(AttnProcessor2_0()))` has them."""
    # Layers that were wrapped by hand count as one model, and a new one may get a dead one's id.
    monkeypatch.setattr(running, "plans", PlanCache())
    shared = FA3AttnProcessor(AttnProcessor2_0(), kernel="reference", fallback="error")
    stack = layers(4, lambda i: shared)
    with mode():
        x, mask = torch.randn(2, 6, 8), (torch.arange(6) < torch.tensor([[4], [6]]))[:, None]
        run(stack, x, mask)
        run(stack, x, mask)
    report = coverage(stack)
    record = shared._fa3
    assert (record.plans_made, record.plans_reused) == (2, 6)
    assert report.fallbacks == 0


def test_two_models_with_one_mask_each_read_it() -> None:
    first, second = (layers(3, lambda i: AttnProcessor2_0()) for _ in range(2))
    plain = layers(3, lambda i: AttnProcessor2_0())
    for stack in (first, second):
        enable_fa3(stack, kernel="reference", fallback="error")
    x, mask = torch.randn(2, 6, 8), (torch.arange(6) < torch.tensor([[4], [6]]))[:, None]
    run(first, x, mask)
    mask.data[:, :, 2] = False  # no layer of the second model has run before
    torch.testing.assert_close(run(second, x, mask), run(plain, x, mask))
    assert [coverage(stack).plans_made for stack in (first, second)] == [1, 1]


def test_a_layer_that_runs_twice_in_a_forward_reads_once_more() -> None:
    stack = layers(3, lambda i: AttnProcessor2_0())
    enable_fa3(stack, kernel="reference", fallback="error")
    x, mask = torch.randn(2, 6, 8), (torch.arange(6) < torch.tensor([[4], [6]]))[:, None]
    run(nn.ModuleList([*stack, *stack]), x, mask)
    assert (coverage(stack).plans_made, coverage(stack).plans_reused) == (2, 4)


def change(mask: Tensor, how: str) -> None:
    """Have rank 0's mask in the memory of rank 1's, unseen by PyTorch."""
    if how == "broadcast":
        dist.broadcast(mask, 0)
    elif how == "all_reduce":
        number = mask if mask.dtype != torch.bool else mask.view(torch.uint8)
        dist.all_reduce(number, dist.ReduceOp.MIN)
    elif dist.get_rank() == 0:
        dist.send(mask, 1)
    else:
        dist.recv(mask, 0)


def received(rank: int, name: str) -> dict[str, float]:
    """The error of a switched model after its mask was changed by another rank."""
    case, found = BY_NAME[name], {}
    for how in ("broadcast", "all_reduce", "recv"):
        inputs = case.inputs("ragged", 0.0)
        (mask,) = masks_of(inputs)
        switched, default = case.build(), case.build()
        enable_fa3(switched, kernel="reference", fallback="error")
        with torch.no_grad():
            switched(**inputs)
            if rank == 0:
                mask[..., 1] = 0
            change(mask, how)
            assert not mask[..., 1].any()
            found[how] = (switched(**inputs)[0] - default(**inputs)[0]).abs().max().item()
    return found


@pytest.mark.parametrize("name", [n for n in ("qwenimage", "flux") if n in BY_NAME])
def test_a_mask_received_from_another_rank_is_read(name: str) -> None:
    for found in results("test_forwards:received", 2, name):
        assert max(found.values()) < 1e-5, found


def test_a_call_without_a_layer_keeps_no_plan() -> None:
    q, k, v = torch.randn(3, 1, 4, 2, 8)
    mask = torch.tensor([[True, True, False, True]])
    first = attention(q, k, v, mask, kernel="reference")
    mask.data[0, 1] = False
    assert not torch.equal(attention(q, k, v, mask, kernel="reference"), first)
