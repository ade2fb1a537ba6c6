"""A processor's arguments are sorted: masks, what masks may be made of, what may hide a mask."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from diffusers_fa3.layers.given import Given, read_arguments

MASK = torch.ones(2, 5, dtype=torch.bool)
FLOATS = torch.zeros(2, 5)


class Cache:
    """A stand-in for a diffusers cache; its `__module__` says that it is from diffusers."""

    def __init__(self, **held: object) -> None:
        self.__dict__.update(held)


Cache.__module__ = "diffusers.models.caches"


def given(**kwargs: object) -> Given | None:
    return read_arguments(AttnProcessor2_0(), (nn.Identity(), FLOATS), kwargs)


def test_masks_are_known_by_dtype_and_by_name_and_activations_are_left() -> None:
    found = given(anything=MASK, attention_mask=FLOATS, temb=FLOATS, pair=(MASK, FLOATS))
    assert found is not None
    assert [id(mask) for mask in found.masks] == [id(MASK), id(FLOATS), id(MASK)]
    assert found.rest == []


def test_numbers_and_slices_are_what_masks_are_made_of() -> None:
    found = given(length=3, part=slice(1, 4), none=None)
    assert found is not None
    assert found.rest == [("length", 3), ("part", 1, 4, None), ("none", None)]
    hash(tuple(found.rest))


def test_what_a_cache_holds_is_sorted_too() -> None:
    found = given(kv_cache=Cache(k=FLOATS, key_mask=MASK, mode="extract"))
    assert found is not None
    assert [id(mask) for mask in found.masks] == [id(MASK)]
    assert found.rest == [("mode", "extract")]


def within_itself() -> Cache:
    cache = Cache()
    cache.outer = cache
    return cache


@pytest.mark.parametrize(
    "hides",
    [{"mask": MASK}, object(), Cache(inner=Cache(mask=MASK)), Cache(mask={}), within_itself()],
    ids=["dict", "object", "nested", "dict within", "cycle"],
)
def test_what_could_hide_a_mask_is_not_read(hides: object) -> None:
    assert given(argument=hides) is None


def test_a_processor_that_is_not_of_diffusers_could_do_anything() -> None:
    assert read_arguments(object(), (), {}) is None


@pytest.mark.parametrize(
    ("made", "settled"),
    [
        (torch.ones(2, 1, 5, 5, dtype=torch.bool), True),
        (torch.zeros(2, 3, 1, 5), True),
        (torch.zeros(2, 1, 1, 5).expand(2, 1, 5, 5), True),
        (torch.zeros(2, 3, 5, 5), False),
    ],
    ids=["bool", "a row", "a row expanded", "rows"],
)
def test_additive_rows_may_be_a_bias_unless_such_were_given(
    made: torch.Tensor, settled: bool
) -> None:
    assert Given([MASK, torch.zeros(5, 5)]).settles(made) == settled
    assert Given([torch.zeros(2, 5, 5)]).settles(made)
