"""What random calls have found, at its smallest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_fa3 import FallbackWarning, attention, plan_packing
from diffusers_fa3.masks.meaning import Sequences, Valid
from diffusers_fa3.masks.outer import OuterMask, SpreadMask
from diffusers_fa3.masks.read import read_mask

from .expected import sdpa


def rows(*each: str) -> Tensor:
    """(1, 1, Sq, Sk) bool."""
    return torch.tensor([[key == "1" for key in row] for row in each])[None, None]


def qkv(mask: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, length, 2, 8, generator=generator, dtype=dtype)
        for length in (mask.shape[-2], mask.shape[-1], mask.shape[-1])
    )
    return q, k, v


def test_a_bias_of_one_axis_goes_to_pytorch_which_takes_none() -> None:
    bias = torch.randn(5, dtype=torch.float64)
    q, k, v = qkv(bias.expand(3, 5))
    with pytest.warns(FallbackWarning, match="bias"):
        output = attention(q, k, v, bias)
    assert torch.equal(output, sdpa(q, k, v, bias[None, None, None], None, False))


def test_a_static_plan_may_be_made_of_a_mask_without_queries_or_without_keys() -> None:
    no_queries = torch.ones(2, 1, 0, 5, dtype=torch.bool)
    assert plan_packing(no_queries, batch=2, q_len=0, k_len=5, static=True).route == "static"
    no_keys = torch.ones(2, 0, dtype=torch.bool)
    plan = plan_packing(no_keys, batch=2, q_len=3, k_len=0, static=True)
    assert plan.seqused_k is not None
    assert plan.seqused_k.tolist() == [0, 0]


def test_rows_that_only_by_their_number_of_keys_could_be_causal_are_groups() -> None:
    mask = rows("010001", "000010", "010001")  # segments, mixed: 2 keys, 1, 2
    meaning = read_mask(mask, batch=1, heads=1, q_len=3, k_len=6)
    assert isinstance(meaning, Sequences)
    assert [group.queries.tolist() for group in meaning.sequences] == [[0, 2], [1]]
    q, k, v = qkv(mask)
    output = attention(q, k, v, mask, kernel="reference")
    torch.testing.assert_close(output, sdpa(q, k, v, mask, None, False))


def test_keys_out_of_reach_of_a_band_may_hold_anything() -> None:
    mask = rows("0110", "0011")
    q, k, v = qkv(mask)
    clean = attention(q, k, v, mask, kernel="reference")
    assert plan_packing(mask, batch=1, q_len=2, k_len=4).route == "band"
    k[:, 0] = v[:, 0] = torch.nan
    assert torch.equal(attention(q, k, v, mask, kernel="reference"), clean)


def test_a_query_before_a_causal_group_that_sees_nothing_may_hold_anything() -> None:
    mask = rows("0000", "1000", "1100", "1110")
    q, k, v = qkv(mask)
    clean = attention(q, k, v, mask, kernel="reference")
    q[:, 0] = torch.nan
    assert torch.equal(attention(q, k, v, mask, kernel="reference"), clean)


def test_gradients_are_0_where_no_sample_has_a_key() -> None:
    mask = rows("000", "000")
    leaves = [x.requires_grad_() for x in qkv(mask)]
    output = attention(*leaves, mask, kernel="reference")
    for gradient in torch.autograd.grad(output.sum(), leaves):
        assert not gradient.any()


def test_valid_keys_are_bools() -> None:
    meaning = read_mask(rows("101"), batch=1, heads=1, q_len=1, k_len=3)
    assert isinstance(meaning, Valid)
    assert meaning.keys.dtype == torch.bool


@pytest.mark.parametrize("shape", [(1, 4), (3, 1)], ids=["one sample for all", "one token for all"])
def test_the_product_of_an_expanded_mask_is_of_full_size(shape: tuple[int, int]) -> None:
    spread = torch.ones(shape, dtype=torch.bool).expand(3, 4).as_subclass(SpreadMask)
    assert (spread[:, None, None, :] & spread[:, None, :, None]).shape == (3, 1, 4, 4)


def test_no_factors_are_made_of_masks_that_are_none() -> None:
    keys = torch.tensor([[True, False]]).as_subclass(SpreadMask)[:, None, None]
    rows_of_one = keys[..., :1].repeat(1, 1, 3, 1)
    product = keys.repeat(1, 1, 3, 1) & rows_of_one[:, :, :1]
    assert torch.equal(product.as_subclass(Tensor), torch.tensor([True, False]).expand(1, 1, 3, 2))
    none = keys[..., :1].repeat(1, 1, 1, 2)[..., :0]
    none = none & none
    assert none.shape == (1, 1, 1, 0)
    assert type(none) is not OuterMask


def test_a_mask_repeated_by_a_view_can_be_viewed_as_its_copy_could() -> None:
    plain = torch.tensor([[True, False, True]])
    spread = plain.as_subclass(SpreadMask)
    repeated = spread.view(1, 1, 1, 3).repeat(1, 1, 3, 1).view(1, 9)
    assert torch.equal(repeated.as_subclass(Tensor), plain.repeat(1, 3))
    padded = F.pad(spread, (0, 1)).repeat(repeats=(2, 1))
    assert padded.shape == (2, 4)
