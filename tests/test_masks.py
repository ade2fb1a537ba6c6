"""What a mask means depends on its content, not on its shape, dtype or strides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns import rebuilt

from diffusers_fa3 import MaskError
from diffusers_fa3.masks.meaning import AllValid, Band, Opaque, Valid
from diffusers_fa3.masks.read import read_mask

B, H, SQ, SK = 2, 3, 4, 5
SIZES = {"batch": B, "heads": H, "q_len": SQ, "k_len": SK}

ALL = [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
RIGHT = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
LEFT = [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]
GAP = [[1, 0, 0, 1, 1], [1, 1, 0, 1, 1]]
SCATTERED = [[1, 0, 1, 0, 1], [0, 1, 0, 1, 0]]
ONE_SAMPLE_EMPTY = [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]

LAYOUTS = {
    "(B, Sk)": lambda keys: keys,
    "(B, 1, 1, Sk)": lambda keys: keys[:, None, None],
    "(B, H, 1, Sk)": lambda keys: keys[:, None, None].repeat(1, H, 1, 1),
    "(B, H, 1, Sk) expanded": lambda keys: keys[:, None, None].expand(-1, H, -1, -1),
    "(B, 1, Sq, Sk)": lambda keys: keys[:, None, None].repeat(1, 1, SQ, 1),
    "(B, H, Sq, Sk) expanded": lambda keys: keys[:, None, None].expand(-1, H, SQ, -1),
    "(B, H, Sq, Sk) transposed": lambda keys: (
        keys[:, None, None].repeat(1, H, SQ, 1).mT.contiguous().mT
    ),
}
FORMS = {
    "bool": lambda seen: seen,
    "int64": lambda seen: seen.long(),
    "uint8": lambda seen: seen.to(torch.uint8),
    "-inf": lambda seen: torch.zeros(seen.shape).masked_fill(~seen, -torch.inf),
    "-1e4": lambda seen: (1 - seen.float()) * -1e4,
    "finfo.min in bfloat16": lambda seen: torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(
        ~seen, torch.finfo(torch.bfloat16).min
    ),
}


def mask_of(rows: list[list[int]], layout: str, form: str) -> torch.Tensor:
    """The mask of these valid keys, in a given layout and form."""
    return LAYOUTS[layout](FORMS[form](torch.tensor(rows, dtype=torch.bool)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [RIGHT, LEFT, GAP, SCATTERED], ids=str)
def test_key_padding_is_found_in_every_layout_and_form(
    rows: list[list[int]], layout: str, form: str
) -> None:
    meaning = read_mask(mask_of(rows, layout, form), **SIZES)
    assert isinstance(meaning, Valid)
    assert meaning.keys.tolist() == [[bool(x) for x in row] for row in rows]
    assert meaning.k_lens == tuple(sum(row) for row in rows)
    assert meaning.k_leading == (rows is RIGHT)
    assert meaning.queries is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_all_true_mask_says_nothing(layout: str, form: str) -> None:
    assert isinstance(read_mask(mask_of(ALL, layout, form), **SIZES), AllValid)


@pytest.mark.parametrize("shape", [(SK,), (1, SK), (1, 1, 1, SK), (1, H, SQ, SK)], ids=str)
def test_one_row_for_all_samples_stays_one_row(shape: tuple[int, ...]) -> None:
    mask = torch.tensor(GAP[0], dtype=torch.bool).expand(shape)
    meaning = read_mask(mask, **SIZES)
    assert isinstance(meaning, Valid)
    assert meaning.keys.shape == (1, SK)
    assert meaning.k_lens == (3,)


def test_a_mask_of_one_column_counts_for_every_key() -> None:
    mask = torch.tensor([True, False])[:, None, None, None]
    meaning = read_mask(mask, **SIZES)
    assert isinstance(meaning, Valid)
    assert meaning.k_lens == (SK, 0)


def test_two_axes_are_batch_and_keys_or_queries_and_keys_as_the_caller_says() -> None:
    square = torch.ones(4, 4, dtype=torch.bool).tril()
    sizes = {"batch": 4, "heads": 1, "q_len": 4, "k_len": 4}
    per_key = read_mask(square, **sizes, axes_2d="bk")
    assert isinstance(per_key, Valid)
    assert per_key.k_lens == (1, 2, 3, 4)
    per_query = read_mask(square, **sizes, axes_2d="qk")
    assert per_query == Band(-1, 0)


@pytest.mark.parametrize("form", ["bool", "int64", "-inf"])
def test_an_outer_product_keeps_queries_and_keys(form: str) -> None:
    queries = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    keys = torch.tensor(GAP, dtype=torch.bool)
    outer = queries[:, None, :, None] & keys[:, None, None, :]
    meaning = read_mask(FORMS[form](outer), **SIZES)
    assert isinstance(meaning, Valid)
    assert torch.equal(meaning.keys, keys)
    assert meaning.queries is not None
    assert torch.equal(meaning.queries, queries)
    assert meaning.q_lens == (2, 3)


def test_a_sample_without_keys_counts_as_an_outer_product_too() -> None:
    mask = mask_of(ONE_SAMPLE_EMPTY, "(B, 1, Sq, Sk)", "bool")
    meaning = read_mask(mask, **SIZES)
    assert isinstance(meaning, Valid)
    assert meaning.k_lens == (2, 0)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (torch.rand(B, H, SQ, SK), "float32 mask with values that are a bias, not a mask"),
        (torch.ones(B, 1, SQ, SK), "float32 mask with values that are a bias, not a mask"),
        (torch.full((B, 1, 1, SK), -9e3), "values that are a bias"),
        (torch.full((B, 1, 1, SK), torch.nan), "values that are a bias"),
        (torch.eye(H, SK, dtype=torch.bool)[None, :, None], "mask differs between heads"),
        (torch.full((B, 1, 1, SK), -1e4), "a row that has no valid key and finite values"),
    ],
    ids=["bias", "ones", "-9e3", "nan", "per head", "-1e4 throughout"],
)
def test_what_packing_cannot_express_is_named(mask: torch.Tensor, reason: str) -> None:
    meaning = read_mask(mask, **SIZES)
    assert isinstance(meaning, Opaque)
    assert reason in meaning.reason


def test_a_mask_that_learns_is_a_bias() -> None:
    mask = torch.zeros(B, 1, 1, SK, requires_grad=True)
    assert read_mask(mask, **SIZES) == Opaque("mask that gradients are asked for")


@pytest.mark.parametrize(
    "shape",
    [(B + 1, SK), (B, SK - 1), (B, 2, 1, SK), (B, 1, SQ + 1, SK), (1, 1, 1, 1, SK), ()],
    ids=str,
)
def test_a_mask_that_does_not_broadcast_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(MaskError, match=r"does not broadcast to \(B, H, Sq, Sk\) = \(2, 3, 4, 5\)"):
        read_mask(torch.ones(shape, dtype=torch.bool), **SIZES)


def test_an_int_mask_of_other_numbers_is_refused() -> None:
    with pytest.raises(MaskError, match="int64 mask with values other than 0 and 1"):
        read_mask(torch.full((B, SK), 2), **SIZES)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_meaning_is_the_mask(data: st.DataObject) -> None:
    """A mask that is not opaque can be rebuilt from its meaning."""
    sizes = [data.draw(st.integers(1, 4), label=name) for name in ("B", "H", "Sq", "Sk")]
    shape = [data.draw(st.sampled_from([1, size])) for size in sizes[:3]] + [sizes[3]]
    bits = data.draw(st.lists(st.booleans(), min_size=4, max_size=40))
    count = torch.Size(shape).numel()
    mask = torch.tensor((bits * (count // len(bits) + 1))[:count]).view(shape)
    if data.draw(st.booleans(), label="outer"):
        mask = mask.any(-1, keepdim=True) & mask.any(-2, keepdim=True)
    batch, heads, q_len, k_len = sizes
    meaning = read_mask(mask, batch=batch, heads=heads, q_len=q_len, k_len=k_len)

    full = mask.expand(sizes)
    if isinstance(meaning, Opaque):
        outer = full.any(-1, keepdim=True) & full.any(-2, keepdim=True)
        assert not torch.equal(outer, full) or not torch.equal(full, full[:, :1].expand(sizes))
    else:
        assert torch.equal(rebuilt(meaning, (batch, heads, q_len, k_len)), full)
