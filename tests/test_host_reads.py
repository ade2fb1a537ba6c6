"""A mask is read once per forward, whatever the number of layers; nothing else is read at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from reads import HostReads, reference
from torch import nn
from torch.nn import functional as F
from zoo import CASES, RUNS, Case, Layout
from zoo.budget import assert_within_budget
from zoo.case import cast, key_mask
from zoo.watch import watched

from diffusers_fa3 import coverage, enable_fa3, plan_packing
from diffusers_fa3.layers import frame
from diffusers_fa3.masks import read
from diffusers_fa3.masks.outer import OuterMask
from diffusers_fa3.masks.packing import PackingPlan
from diffusers_fa3.masks.plan_cache import PlanCache

BY_NAME = {case.name: case for case in CASES}

LEAST_BY_ROW, MOST_BY_ROW = 3, 4
"""Reads of a mask that depends on the query: the facts that are read of any mask; the rows that
change; whether the mask is a band, or a row of each group; and, if groups look causal, whether they
are."""

EQUAL_MASKS = ("longcat_audio_dit",)
"""Models that are given two masks of the same content."""

# flex_attention compiles itself when it is called, and modes do not work in compiled code.
ON_A_KERNEL = [run for run in RUNS if "flex_attention" not in run[0].unreached]


@pytest.fixture(autouse=True)
def no_plans_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame.running, "plans", PlanCache())


@pytest.fixture
def read_by_row(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The masks that turned out to depend on the query."""
    seen: list[torch.Tensor] = []
    read_rows = read.read_rows

    def spy(mask: torch.Tensor, counts: torch.Tensor) -> object:
        seen.append(mask)
        return read_rows(mask, counts)

    monkeypatch.setattr(read, "read_rows", spy)
    return seen


def forward(case: Case, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return case.pick(model(**inputs, return_dict=False))


def reads_of(function: Callable[..., object], *args: Any, **kwargs: Any) -> list[str]:
    """The reads during a call, each with its place."""
    with HostReads() as reads:
        function(*args, **kwargs)
    return reads.places


def assert_read_once(own: int, places: list[str], made: int, by_row: int) -> None:
    """Assert that each plan cost one read, or a few by row, besides the reads of diffusers."""
    reads = len(places) - own - (made - by_row)
    assert LEAST_BY_ROW * by_row <= reads <= MOST_BY_ROW * by_row, places


# --- how reads are counted ------------------------------------------------------------------------

X = torch.arange(6.0)
SEEN = torch.tensor([True, False, True, True, False, False])

READ: dict[str, Callable[[], object]] = {
    "item": lambda: X.sum().item(),
    "bool": lambda: bool(SEEN.any()),
    "int": lambda: int(X.sum()),
    "a slice up to a tensor": lambda: X[: SEEN.sum()],
    "tolist": lambda: X.tolist(),
    "cpu": lambda: X.cpu(),
    "to the host": lambda: X.to("cpu"),
    "to the host by name": lambda: X.to(device="cpu", dtype=torch.float64),
    "to where a tensor of the host is": lambda: X.to(torch.zeros(1).device),
    "numpy": lambda: X.numpy(),
    "a list of tensors": lambda: torch.tensor([X.sum()]),
    "nonzero": lambda: SEEN.nonzero(),
    "where": lambda: torch.where(SEEN),
    "masked_select": lambda: X.masked_select(SEEN),
    "unique": lambda: X.unique(),
    "indexed by a mask": lambda: X[SEEN],
    "written by a mask": lambda: X.clone().__setitem__(SEEN, torch.ones(3, device=X.device)),
    "equal": lambda: torch.equal(X, X),
    "allclose": lambda: torch.allclose(X, X),
    "repeated as a tensor says": lambda: X.repeat_interleave(SEEN.long()),
}
FREE: dict[str, Callable[[], object]] = {
    "computing": lambda: F.pad(torch.where(X > 2, X, 0).cumsum(0), (1, 0)),
    "facts": lambda: (X.shape, X.dtype, X.device, X.is_floating_point()),
    "to where it is": lambda: X.to(X.device),
    "to another dtype": lambda: X.to(torch.float64).to(X),
    "a new tensor": lambda: torch.ones(3, device=X.device),
    "indexed by numbers": lambda: X[[0, 2]] + X[torch.tensor([1, 3])],
    "of a size that is known": lambda: torch.nonzero_static(SEEN, size=3),
    "what the host made": lambda: (torch.arange(3).tolist(), torch.ones(3).sum().item()),
    "bytes": lambda: torch.frombuffer(bytearray(3), dtype=torch.bool).nonzero(),
}


@pytest.mark.parametrize("read", READ.values(), ids=READ.keys())
def test_what_makes_the_host_wait_is_one_read(read: Callable[[], object]) -> None:
    assert len(reads_of(read)) == 1


@pytest.mark.parametrize("use", FREE.values(), ids=FREE.keys())
def test_what_need_not_wait_is_none(use: Callable[[], object]) -> None:
    assert reads_of(use) == []


def test_what_came_to_the_host_is_free_from_there_on_and_back_on_the_device_no_more() -> None:
    def there_and_back() -> float:
        here = X.cpu()
        assert here.device != X.device
        value = here.sum().item() + here.flip(0).nonzero().sum().item()
        back = (here + 1).to(X.device)
        assert back.device == X.device
        return value + back.sum().item()

    places = reads_of(there_and_back)
    assert [place.split()[0] for place in places] == ["cpu", "aten._local_scalar_dense.default"]
    assert all(__file__ in place for place in places)


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "layout"), ON_A_KERNEL, ids=[f"{case.name}-{layout}" for case, layout in ON_A_KERNEL]
)
def test_a_mask_is_read_once_per_forward_and_nothing_else_is(
    case: Case, layout: Layout, read_by_row: list[torch.Tensor]
) -> None:
    model = case.build()
    inputs = cast(case.inputs(layout, 0.0), torch.float32)
    with watched() as log:
        forward(case, model, inputs)
    given = {call.content for call in log.calls if call.mask}
    own = len(reads_of(forward, case, model, inputs))

    enable_fa3(model, kernel=reference, fallback="silent")
    places = reads_of(forward, case, model, inputs)
    made = coverage(model).plans_made
    assert_read_once(own, places, made, len(read_by_row))
    if case.refusal is None and not case.outside:
        assert made == len(given) + (case.name in EQUAL_MASKS and layout != "none")

    read_by_row.clear()
    again = reads_of(forward, case, model, inputs)
    made_again = coverage(model).plans_made - made
    assert_read_once(own, again, made_again, len(read_by_row))
    assert made_again == made  # a plan lives for one forward


class Switched:
    """A switched model beside the same one on its default attention."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.model, self.default, self.exact = case.build(), case.build(), case.build(torch.float64)
        enable_fa3(self.model, kernel=reference, fallback="error")

    def forward(self, inputs: dict[str, Any]) -> tuple[int, int, int]:
        """Return the reads, plans made and plans reused of a forward whose output is right."""
        before = coverage(self.model)
        with HostReads() as own:
            default = forward(self.case, self.default, inputs)
        with HostReads() as reads:
            output = forward(self.case, self.model, inputs)
        exact = forward(self.case, self.exact, cast(inputs, torch.float64))
        assert_within_budget(output, default, exact)
        after = coverage(self.model)
        made = after.plans_made - before.plans_made
        return reads.count - own.count, made, after.plans_reused - before.plans_reused


def mask_in(inputs: dict[str, Any]) -> torch.Tensor:
    """Return the mask that a caller gives."""
    given: Mapping[str, Any] = {**inputs, **(inputs.get("joint_attention_kwargs") or {})}
    (mask,) = (given[name] for name in MASK_NAMES if name in given)
    return mask


MASK_NAMES = ("attention_mask", "encoder_hidden_states_mask")
TWENTY_LAYERS = {
    "flux": {"num_layers": 10, "num_single_layers": 10},
    "chroma": {"num_layers": 10, "num_single_layers": 10},
    "qwenimage": {"num_layers": 20},
}


@pytest.mark.parametrize("name", [name for name in TWENTY_LAYERS if name in BY_NAME])
def test_twenty_layers_share_one_plan_in_each_forward(name: str) -> None:
    case = BY_NAME[name]
    case = replace(case, config={**case.config, **TWENTY_LAYERS[name]})
    switched = Switched(case)
    one, another = case.inputs("gap", 0.0), case.inputs("ragged", 0.0)
    assert switched.forward(one) == (1, 1, 19)
    assert "; 1 plans made, 19 reused" in str(coverage(switched.model))
    assert switched.forward(one) == (1, 1, 19)
    mask_in(one)[..., 1] = False
    assert switched.forward(one) == (1, 1, 19)
    assert switched.forward(another) == (1, 1, 19)
    with torch.inference_mode():
        assert switched.forward(case.inputs("gap", 0.0)) == (1, 1, 19)


@pytest.mark.parametrize("name", [name for name in ("qwenimage21",) if name in BY_NAME])
def test_calls_of_one_processor_with_different_masks_have_a_plan_each(name: str) -> None:
    case = BY_NAME[name]
    case = replace(case, config={**case.config, "num_layers": 5})
    switched = Switched(case)
    inputs = case.inputs("ragged", 0.0)
    # Calls of a layer: text, an image within the text, text, the target image; each has more keys.
    assert switched.forward(inputs)[1:] == (4, 16)
    mask_in(inputs)[..., 1] = False
    assert switched.forward(inputs)[1:] == (4, 16)
    assert switched.forward(case.inputs("gap", 0.0))[1:] == (4, 16)


# --- plans ----------------------------------------------------------------------------------------

SIZES = {"batch": 2, "q_len": 12, "k_len": 12}
RAGGED, GAP = key_mask("ragged"), key_mask("gap")

PER_KEY = {
    "bool": GAP,
    "int": GAP.long(),
    "(B, 1, 1, Sk)": RAGGED[:, None, None],
    "(B, H, Sq, Sk), expanded": GAP[:, None, None].expand(2, 3, 12, 12),
}


def pack_and_unpack(plan: PackingPlan) -> None:
    q, k, v = torch.randn(3, 2, 12, 3, 8, device=X.device)
    result, *_ = plan.pack(q, k, v)
    plan.unpack(result)
    out = torch.empty_like(q)
    plan.unpack(result, out)
    plan.unpack_lse(result[..., 0].transpose(-1, -2))


@pytest.mark.parametrize("mask", PER_KEY.values(), ids=PER_KEY.keys())
def test_a_static_plan_is_made_and_used_without_any_read(mask: torch.Tensor) -> None:
    plans: list[PackingPlan] = []

    def make_and_use() -> None:
        plans.append(plan_packing(mask, **SIZES, heads=3, static=True))
        pack_and_unpack(plans[0])

    assert reads_of(make_and_use) == []
    assert plans[0].route == "static"


ROUTES = {
    "dense": (torch.ones_like(GAP), "dense", 1),
    "seqused": (RAGGED, "seqused", 1),
    "keys": (GAP, "packed", 1),
    "additive": (torch.where(GAP, 0, -torch.inf)[:, None, None], "packed", 1),
    "queries": (GAP[:, None, :, None] & GAP[:, None, None], "packed", 1),
    "factors": (OuterMask(GAP[:, None, :, None], RAGGED[:, None, None]), "packed", 1),
    "band": (torch.ones(12, 12, dtype=torch.bool).tril()[None, None], "band", LEAST_BY_ROW),
    "segments": (
        torch.block_diag(*torch.ones(3, 4, 4)).bool()[None, None],
        "packed",
        LEAST_BY_ROW,
    ),
}


@pytest.mark.parametrize(("mask", "route", "reads"), ROUTES.values(), ids=ROUTES.keys())
def test_a_plan_reads_its_mask_when_it_is_made_and_never_again(
    mask: torch.Tensor, route: str, reads: int
) -> None:
    plans: list[PackingPlan] = []
    places = reads_of(lambda: plans.append(plan_packing(mask, **SIZES, heads=3)))
    assert plans[0].route == route
    assert len(places) == reads
    assert reads_of(pack_and_unpack, plans[0]) == []
