"""Attention over tokens that are split over ranks, tensors alone: equal to one process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import degrees, results
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_fa3 import ParallelError
from diffusers_fa3.attention import Declined, default_attention
from diffusers_fa3.kernels.contract import Provider
from diffusers_fa3.kernels.installed import kernel_named
from diffusers_fa3.kernels.selection import Selector
from diffusers_fa3.parallel import Memory, attend, attend_split, exchange
from diffusers_fa3.parallel.decide import axes_of
from diffusers_fa3.parallel.exchange import Axes, sent

BATCH, LENGTH, HEADS, HEAD_DIM = 2, 24, 12, 8
WORLDS = {2: ("U2", "R2", "UA2", "RA2"), 3: ("U3", "R3", "UA3", "RA3"), 4: ("U2R2", "R4", "UA4")}


def axes_for(mode: str) -> Axes:
    """The axes of a configuration, also of modes that an old diffusers does not have."""
    told = degrees(mode)
    shape = (told.get("ring_degree", 1), told.get("ulysses_degree", 1))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("ring", "ulysses"))
    config = SimpleNamespace(
        _ulysses_mesh=mesh["ulysses"],
        _ring_mesh=mesh["ring"],
        _flattened_mesh=mesh["ring", "ulysses"]._flatten(),
        ulysses_anything="A" in mode,
    )
    return axes_of(config)


def part(x: Tensor, axes: Axes, dim: int = 1) -> Tensor:
    return x.tensor_split(axes.everyone.size, dim)[axes.everyone.rank]


def forgetful() -> Memory:
    return Memory(lambda mask, call, make: make(), lambda mask, call, make: make())


def split(
    axes: Axes,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    reasons: list[str] | None = None,
    memory: Memory | None = None,
    **options: Any,
) -> Tensor:
    """`attend_split` of this rank's parts; a call that no kernel takes is an error, or a reason."""

    def decline(answer: Declined) -> None:
        if reasons is None:
            raise answer.error
        reasons.append(answer.reason)

    told: dict[str, Any] = {"scale": None, "kernel": "reference", "axes_2d": "bk"}
    told |= {"pack_queries": False, "switch_id": 0, "segments": (), **options}
    out, _ = attend_split(
        q, k, v, mask, axes, memory=memory or forgetful(), decline=decline, **told
    )
    return out


def layouts(world: int) -> Iterator[tuple[str, Tensor]]:
    """(B, S) masks; True is valid. Of `world` parts, the first or all but the last are padding."""
    generator = torch.Generator().manual_seed(0)
    places = torch.arange(LENGTH)
    each = LENGTH // world
    yield "all true", torch.ones(BATCH, LENGTH, dtype=torch.bool)
    yield "right", places.expand(BATCH, -1) < LENGTH - 7
    yield "left", places.expand(BATCH, -1) >= 5
    yield "ragged", places < torch.tensor([[9], [LENGTH]])
    yield "gap", ((places < 4) | (places > 9)).expand(BATCH, -1)
    yield "scatter", torch.rand(BATCH, LENGTH, generator=generator) < 0.4
    yield "first part is padding", (places >= each).expand(BATCH, -1)
    yield "one part is not padding", (places >= LENGTH - each).expand(BATCH, -1)
    yield "a sample without keys", (places < torch.tensor([[0], [13]]))


def spellings(valid: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "bool", valid
    yield "int", valid.long()
    yield "-inf", torch.zeros(valid.shape).masked_fill(~valid, -torch.inf)[:, None, None]
    yield "-1e4", torch.zeros(valid.shape).masked_fill(~valid, -1e4)[:, None, None]
    yield "heads", valid[:, None, None].repeat(1, HEADS, 1, 1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def errors(rank: int, modes: tuple[str, ...]) -> dict[tuple[str, ...], tuple[float, float]]:
    """Of each call, the error against one process; and against it if attention stayed local."""
    found = {}
    q, k, v = (random(BATCH, LENGTH, HEADS, HEAD_DIM, seed=i) for i in range(3))
    for mode in modes:
        axes = axes_for(mode)
        parts = [part(x, axes) for x in (q, k, v)]
        cases = [("none", "none", None)]
        cases += [
            (layout, spelling, mask)
            for layout, valid in layouts(dist.get_world_size())
            for spelling, mask in spellings(valid)
        ]
        for layout, spelling, mask in cases:
            own = None if mask is None else part(mask, axes, -1)
            averages = spelling == "-1e4" and layout == "a sample without keys"
            reasons: list[str] | None = [] if averages else None
            out = split(axes, *parts, own, reasons)
            expected = part(default_attention(q, k, v, mask, None, False), axes)
            local = default_attention(*parts, own, None, False)
            found[mode, layout, spelling] = (
                (out - expected).abs().max().item(),
                (local - expected).abs().max().item(),
            )
            assert not averages or reasons == [
                "additive mask with a row that has no valid key and finite values: "
                "the default averages over its padding"
            ]
    return found


@pytest.mark.parametrize("world", WORLDS)
def test_every_layout_of_a_mask_is_as_on_one_process(world: int) -> None:
    ranks = results("test_parallel:errors", world, WORLDS[world])
    assert len(ranks[0]) == len(WORLDS[world]) * (1 + 9 * 5)
    for case in ranks[0]:
        assert max(found[case][0] for found in ranks) < 1e-6, case
        # A call that stays local would not pass.
        assert max(found[case][1] for found in ranks) > 1e-3, case


def own_mask_errors(rank: int, modes: tuple[str, ...]) -> dict[tuple[str, ...], float]:
    """The errors if the mask of this rank's keys is taken for that of all."""

    def tiled(mask: Tensor, axes: Axes, *_: object) -> Tensor:
        return mask.repeat(1, 1, 1, axes.everyone.size)

    found = {}
    q, k, v = (random(BATCH, LENGTH, HEADS, HEAD_DIM, seed=i) for i in range(3))
    for mode in modes:
        axes = axes_for(mode)
        for layout, valid in layouts(dist.get_world_size()):
            with mock.patch.object(attend, "whole_mask", tiled):
                out = split(axes, *(part(x, axes) for x in (q, k, v)), part(valid, axes, -1))
            expected = part(default_attention(q, k, v, valid, None, False), axes)
            found[mode, layout] = (out - expected).abs().max().item()
    return found


def test_the_mask_of_the_own_part_would_be_wrong() -> None:
    """The counterpart of the test above: it fails if the mask is not put together."""
    ranks = results("test_parallel:own_mask_errors", 2, ("U2", "R2"))
    for case in ranks[0]:
        worst = max(found[case] for found in ranks)
        assert worst > 1e-3 if case[1] != "all true" else worst < 1e-6, case


def odd_errors(rank: int, modes: tuple[str, ...]) -> dict[tuple[str, str], float]:
    """Lengths, heads and head sizes that do not divide, and keys that every rank has."""
    world = dist.get_world_size()
    found = {}

    def check(
        mode: str, what: str, sizes: tuple[int, int, int, int], dims: tuple[int, int] = (8, 8)
    ) -> None:
        axes = axes_for(mode)
        q_len, k_len, heads, k_heads = sizes
        q = random(BATCH, q_len, heads, dims[0])
        k = random(BATCH, k_len, k_heads, dims[0], seed=1)
        v = random(BATCH, k_len, k_heads, dims[1], seed=2)
        mask = torch.arange(k_len) < torch.tensor([[k_len - 2], [k_len]])
        for own, valid in ((None, None), (part(mask, axes, -1), mask)):
            out = split(axes, *(part(x, axes) for x in (q, k, v)), own)
            expected = part(default_attention(q, k, v, valid, None, False), axes)
            assert out.shape == expected.shape, (mode, what)
            found[mode, f"{what}, {'a mask' if own is not None else 'none'}"] = (
                (out - expected).abs().max().item() if out.numel() else 0.0
            )

    for mode in modes:
        n = 4 * world
        check(mode, "cross attention", (n, 2 * n, n, n))
        check(mode, "head sizes differ", (n, n, n, n), (8, 16))
        check(mode, "grouped heads", (n, n, 2 * n, n))
        check(mode, "one group", (n, n, n, 1))
        if "A" in mode:
            check(mode, "lengths that do not divide", (n + 1, n + 3, n, n))
            check(mode, "as many queries as keys here alone", (2 * world + 1, 2 * world, n, n))
            check(mode, "heads that do not divide", (n + 1, n + 1, 5, 5))
            check(mode, "fewer heads than ranks", (n, n, 1, 1))
            check(mode, "groups that do not divide", (n + 1, n + 1, 10, 5))
            check(mode, "ranks without queries", (world - 1, n, 2, 2))
        first = (random(BATCH, 5, n, 8, seed=3), random(BATCH, 5, n, 8, seed=4))
        q, k, v = (random(BATCH, n, heads, 8, seed=i) for i, heads in enumerate((2 * n, n, n)))
        axes = axes_for(mode)
        own = [torch.cat([x, part(y, axes)], 1) for x, y in zip(first, (k, v))]
        out = split(axes, part(q, axes), *own, None, first=5)
        whole = [torch.cat([x, y], 1) for x, y in zip(first, (k, v))]
        expected = part(default_attention(q, *whole, None, None, False), axes)
        found[mode, "first keys that every rank has"] = (out - expected).abs().max().item()
        valid = torch.ones(BATCH, own[0].shape[1], dtype=torch.bool)
        with pytest.raises(ParallelError, match="a mask of keys some of which every rank has"):
            split(axes, part(q, axes), *own, valid, first=5)
    axes = axes_for(modes[0])
    q = part(random(BATCH, 4 * world, 4 * world, 8), axes)
    k, v = (random(BATCH, 5, 4 * world, 8, seed=i) for i in (1, 2))
    valid = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 1]], dtype=torch.bool)
    out = split(axes, q, k, v, valid)  # as text that every rank has: seen once by each
    expected = default_attention(q, k, v, valid, None, False)
    found[modes[0], "keys that every rank has"] = (out - expected).abs().max().item()
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_sizes_that_do_not_divide(world: int) -> None:
    for found in results("test_parallel:odd_errors", world, WORLDS[world]):
        for case, error in found.items():
            assert error < 1e-6, case


def biases(rank: int) -> dict[str, tuple[float, list[str]]]:
    """Masks that differ between heads, and biases: PyTorch's attention on the whole tensors."""
    found = {}
    q, k, v = (random(BATCH, LENGTH, 4, HEAD_DIM, seed=i) for i in range(3))
    valid = random(BATCH, 4, 1, LENGTH) > 0
    masks = {"heads differ": valid, "bias": random(BATCH, 1, 1, LENGTH)}
    for (name, mask), mode in itertools.product(masks.items(), WORLDS[2]):
        axes, reasons = axes_for(mode), []
        parts = (part(x, axes) for x in (q, k, v))
        out = split(axes, *parts, part(mask, axes, -1), reasons)
        expected = part(default_attention(q, k, v, mask, None, False), axes)
        found[f"{name} {mode}"] = ((out - expected).abs().max().item(), reasons)
    return found


def test_what_no_kernel_takes_is_served_on_the_whole_tensors() -> None:
    for found in results("test_parallel:biases", 2):
        for case, (error, reasons) in found.items():
            assert error < 1e-6, case
            (reason,) = reasons
            assert ("differs between heads" if "heads" in case else "a bias") in reason


def gradients(
    rank: int, modes: tuple[str, ...], backward: bool = True
) -> dict[tuple[str, str], float]:
    """The relative errors of the gradients of q, k and v of this rank's tokens.

    Without `backward`, no kernel has one, as on a GPU where only raw ops are installed.
    """
    found = {}
    reasons: list[str] | None = None if backward else []
    if not backward:
        limits = replace(kernel_named("reference").limits, backward=False)
        without = replace(kernel_named("reference"), limits=limits)
        only = Selector([Provider("without", lambda: without, "", cuda=False)])
        mock.patch("diffusers_fa3.attention.select", only.select).start()
    for mode, (name, mask) in itertools.product(
        modes, (("none", None), *layouts(dist.get_world_size()))
    ):
        heads, k_heads = (1, 1) if name == "left" and "A" in mode else (8, 4)
        whole = [
            random(BATCH, LENGTH, n, HEAD_DIM, seed=i)
            for i, n in enumerate((heads, k_heads, k_heads))
        ]
        axes = axes_for(mode)
        weights = random(BATCH, LENGTH, heads, HEAD_DIM, seed=3)
        inputs = [x.clone().requires_grad_() for x in whole]
        out = default_attention(*inputs, mask, None, False)
        expected = [part(g, axes) for g in torch.autograd.grad((out * weights).sum(), inputs)]
        own = [part(x, axes).clone().requires_grad_() for x in whole]
        own_mask = None if mask is None else part(mask, axes, -1)
        out = split(axes, *own, own_mask, reasons, kernel="auto")
        got = torch.autograd.grad((out * part(weights, axes)).sum(), own)
        if reasons is not None:
            (reason,) = reasons
            assert "with backward" in reason, reason
            reasons.clear()
        found[mode, name] = max(
            ((a - b).norm() / b.norm().clamp_min(1e-6)).item() for a, b in zip(got, expected)
        )
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_gradients_are_those_of_one_process(world: int) -> None:
    for found in results("test_parallel:gradients", world, WORLDS[world]):
        for case, error in found.items():
            assert error < 1e-5, case


def test_gradients_without_a_backward_are_those_of_the_default() -> None:
    for found in results("test_parallel:gradients", 2, ("U2", "R2"), False):
        for case, error in found.items():
            assert error < 1e-5, case


def counting(name: str, counted: dict[str, int]) -> Callable[..., Any]:
    """A collective of torch.distributed that counts what it sends to other ranks."""
    collective = getattr(dist if hasattr(dist, name) else exchange, name)

    def call(arrived: Tensor, rows: Tensor, *args: Any, **kwargs: Any) -> Any:
        ranks = dist.get_world_size(kwargs["group"])
        away = rows.nbytes * (ranks - 1)
        counted["collectives"] += 1
        counted["bytes"] += away if "gather" in name else away // ranks
        return collective(arrived, rows, *args, **kwargs)

    return call


def costs(rank: int, modes: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """What a call sends, told by the calls of torch.distributed themselves."""
    found = {}
    for mode in modes:
        axes = axes_for(mode)
        counted = {"collectives": 0, "bytes": 0}
        q, k, v = (part(random(BATCH, LENGTH, HEADS, HEAD_DIM, seed=i), axes) for i in range(3))
        sent.clear()
        with (
            mock.patch.object(dist, "all_to_all_single", counting("all_to_all_single", counted)),
            mock.patch.object(exchange, "_gather_parts", counting("_gather_parts", counted)),
        ):
            split(axes, q, k, v, None)
        assert sent["tokens"] == counted["collectives"]
        assert sent["tokens bytes"] == counted["bytes"]
        found[mode] = counted
        sent.clear()
        split(axes, q, k, v, torch.ones(BATCH, q.shape[1], dtype=torch.bool))
        found[f"{mode} mask"] = {"collectives": sent["mask"], "bytes": sent["mask bytes"]}
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_a_call_sends_what_theory_says(world: int) -> None:
    """4(U-1)N/(PU) bytes for tokens and heads, 2(R-1)N/P for keys; and one message for each."""
    modes = {2: ("U2", "R2"), 4: ("U4", "R4", "U2R2")}[world]
    n = BATCH * LENGTH * HEADS * HEAD_DIM * 4
    for found in results("test_parallel:costs", world, modes):
        for mode in modes:
            told = degrees(mode)
            u, r = told.get("ulysses_degree", 1), told.get("ring_degree", 1)
            ulysses, ring = 4 * (u - 1) * n // (world * u), 2 * (r - 1) * n // world
            # Keys of a ring are sent after the trade: 1/U of the heads of U times the tokens.
            assert found[mode]["bytes"] == ulysses + ring, mode
            assert found[mode]["collectives"] == 2 * (u > 1) + (r > 1), mode
            mask = {"collectives": 1, "bytes": (world - 1) * BATCH * LENGTH // world}
            assert found[f"{mode} mask"] == mask, mode


COPIES = {"cat", "clone", "copy_", "index", "index_select", "repeat", "_to_copy"}


class Copies(TorchDispatchMode):
    """The operations that copy, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.made += [name] if name in COPIES else []
        return func(*args, **kwargs or {})


def takes_out(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, out: Tensor | None = None
) -> Tensor:
    """A kernel that can write into `out`, and else returns (B, S, H, D) memory, as Hopper's do."""
    result = default_attention(q, k, v, None, softmax_scale, False)
    return result.contiguous() if out is None else torch.add(result, 0, out=out)


def copies(rank: int, modes: tuple[str, ...]) -> dict[str, list[str]]:
    found = {}
    for mode in modes:
        axes = axes_for(mode)
        q, k, v = (part(random(BATCH, LENGTH, HEADS, HEAD_DIM, seed=i), axes) for i in range(3))
        with Copies() as counted:
            split(axes, q, k, v, None, kernel=takes_out)
        found[mode] = counted.made
    return found


def test_a_call_copies_what_the_exchange_needs_alone() -> None:
    """Into the layout that is sent, and back into (B, S, H, D); the kernel's result needs none."""
    for found in results("test_parallel:copies", 2, ("U2", "R2")):
        assert found == {"U2": ["cat", "clone"], "R2": ["cat"]}
