"""A plan is found again for the same mask, and never for another one."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import pytest
import torch

from diffusers_fa3 import FA3Error, plan_packing
from diffusers_fa3.layers.frame import running
from diffusers_fa3.masks.meaning import Opaque
from diffusers_fa3.masks.packing import PackingPlan
from diffusers_fa3.masks.plan_cache import CAPACITY, PlanCache


def plan_for(
    cache: PlanCache, mask: torch.Tensor, call: object = "call"
) -> tuple[PackingPlan, bool]:
    plan, made = cache.find(
        [mask], call, lambda: plan_packing(mask, batch=2, q_len=4, k_len=4, seqused=False)
    )
    assert isinstance(plan, PackingPlan)
    return plan, made


def padding(*lengths: int) -> torch.Tensor:
    return torch.arange(4) < torch.tensor(lengths)[:, None]


def test_the_same_mask_gives_the_same_plan() -> None:
    cache, mask = PlanCache(), padding(3, 2)
    plan, made = plan_for(cache, mask)
    assert made
    assert plan_for(cache, mask) == (plan, False)


def test_views_alike_of_one_mask_share_a_plan() -> None:
    cache, mask = PlanCache(), padding(3, 2)
    plan, _ = plan_for(cache, mask[:, None, None])
    assert plan_for(cache, mask[:, None, None]) == (plan, False)
    assert plan_for(cache, mask.flip(0)[:, None, None])[1]


def test_an_edit_in_place_makes_another_plan() -> None:
    cache, mask = PlanCache(), padding(3, 2)
    view = mask[:, None, None]
    plan, _ = plan_for(cache, view)
    mask[0, 2] = False
    edited, made = plan_for(cache, view)
    assert made
    assert edited.cu_seqlens_k is not None
    assert edited.cu_seqlens_k.tolist() == [0, 2, 4]
    assert plan.cu_seqlens_k is not None
    assert plan.cu_seqlens_k.tolist() == [0, 3, 5]


def test_another_call_with_the_same_mask_makes_another_plan() -> None:
    cache, mask = PlanCache(), padding(3, 2)
    plan_for(cache, mask, "self attention")
    assert plan_for(cache, mask, "cross attention")[1]


def test_a_new_mask_in_the_memory_of_a_dead_one_makes_another_plan() -> None:
    cache = PlanCache()
    seen = set()
    for length in range(1, 500):
        mask = padding(length % 4, 2)
        seen.add(id(mask))
        plan, made = plan_for(cache, mask)
        assert made
        assert plan.cu_seqlens_k is not None
        assert plan.cu_seqlens_k.tolist() == [0, length % 4, length % 4 + 2]
        del mask, plan
    assert len(seen) < 499, "no address was used twice: this saw nothing"


def test_a_wrong_reuse_is_found_where_one_looks() -> None:
    """The second plan follows from a mask that is not part of the cache key."""
    cache, source = PlanCache(verify=True), padding(3, 2)
    plan_for(cache, source)
    plan_for(cache, source)
    hidden = padding(1, 1)
    with pytest.raises(FA3Error, match="a plan was reused for another mask; got call"):
        cache.find([source], "call", lambda: plan_packing(hidden, batch=2, q_len=4, k_len=4))


def test_of_what_is_not_certain_only_a_refusal_is_found_again() -> None:
    cache, source = PlanCache(verify=True), padding(3, 2)
    refusals = [Opaque("a bias"), Opaque("another bias")]
    plans = [plan_packing(padding(n, n), batch=2, q_len=4, k_len=4) for n in (1, 2)]
    found = [
        cache.find([source], "call", iter([plan]).__next__, certain=False)
        for plan in (*plans, *refusals, plans[0])
    ]
    assert (
        found
        == [(plans[0], True), (plans[1], True), (refusals[0], True)] + [(refusals[0], False)] * 2
    )


def unseen_by_data(mask: torch.Tensor) -> None:
    mask.data[0, 2] = False


def unseen_by_numpy(mask: torch.Tensor) -> None:
    mask.numpy()[0, 2] = False


def unseen_by_storage(mask: torch.Tensor) -> None:
    mask.untyped_storage()[2] = 0


@pytest.mark.parametrize("edit", [unseen_by_data, unseen_by_numpy, unseen_by_storage])
def test_an_edit_that_raises_no_version_is_read_in_the_next_forward(
    edit: Callable[[torch.Tensor], None],
) -> None:
    cache, mask = PlanCache(), padding(3, 2)
    cache.begin("model", 1)
    plan_for(cache, mask)
    cache.begin("model", 2)
    assert not plan_for(cache, mask)[1]
    version = mask._version
    edit(mask)
    assert mask._version == version
    cache.begin("model", 1)
    plan, made = plan_for(cache, mask)
    assert made
    assert plan.cu_seqlens_k is not None
    assert plan.cu_seqlens_k.tolist() == [0, 2, 4]


def test_masks_without_a_version_are_read_once_in_a_forward() -> None:
    cache = PlanCache()
    with torch.inference_mode():
        mask = padding(3, 2)
        assert plan_for(cache, mask)[1]
        assert not plan_for(cache, mask)[1]
        mask[0, 2] = False
        cache.begin("model", 1)
        plan, made = plan_for(cache, mask)
    assert made
    assert plan.cu_seqlens_k is not None
    assert plan.cu_seqlens_k.tolist() == [0, 2, 4]


def test_a_layer_of_another_model_begins_another_forward() -> None:
    cache, mask = PlanCache(), padding(3, 2)
    for model, layer, makes in [
        ("one", 1, True),
        ("one", 2, False),
        ("other", 3, True),
        ("other", 4, False),
        ("one", 5, True),
        ("one", 5, True),
        ("one", 6, False),
    ]:
        cache.begin(model, layer)
        assert plan_for(cache, mask)[1] == makes, (model, layer)


def test_plans_of_dead_masks_are_dropped_and_the_rest_is_bounded() -> None:
    cache = PlanCache()
    for _ in range(10):
        plan_for(cache, padding(3, 2))
    gc.collect()
    plan_for(cache, padding(3, 2))
    assert len(cache._plans) == 1
    alive = [padding(3, 2) for _ in range(CAPACITY + 10)]
    for mask in alive:
        plan_for(cache, mask)
    assert len(cache._plans) == CAPACITY


def test_threads_get_the_plans_of_their_own_masks() -> None:
    caches, wrong = [], []

    def run(length: int) -> None:
        cache = running.plans
        caches.append(cache)
        for _ in range(100):
            mask = padding(length, 2)
            plan, _ = plan_for(cache, mask)
            assert plan.cu_seqlens_k is not None
            if plan.cu_seqlens_k.tolist() != [0, length, length + 2]:
                wrong.append(length)

    threads = [threading.Thread(target=run, args=(length,)) for length in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len({*map(id, caches)}) == len(threads)
