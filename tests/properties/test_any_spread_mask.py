"""Whatever is done with a mask in two factors, it is what it would have been without them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import event, given, note
from hypothesis import strategies as st
from patterns import rebuilt
from torch import Tensor
from torch.nn import functional as F

from diffusers_fa3 import MaskError
from diffusers_fa3.masks.meaning import Opaque
from diffusers_fa3.masks.outer import OuterMask, SpreadMask
from diffusers_fa3.masks.read import read_mask

from . import tried
from .tensors import seeds

SHAPES = {
    "contiguous": lambda batch, length: (batch, length),
    "one sample for all": lambda batch, length: (1, length),
    "one token for all": lambda batch, length: (batch, 1),
}

small = st.integers(0, 3)
axes = st.integers(-4, 3)

UNARY: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "keys": lambda m, i, j: m[:, None, None, :],
    "queries": lambda m, i, j: m[:, None, :, None],
    "view": lambda m, i, j: m.view(m.shape[0], 1, 1, -1),
    "repeat rows": lambda m, i, j: m.repeat(1, 1, m.shape[-1], 1),
    "repeat columns": lambda m, i, j: m.repeat(1, 1, 1, m.shape[-2]),
    "repeat": lambda m, i, j: m.repeat(*[i % 3] * (m.ndim - 1), j % 3),
    "transpose": lambda m, i, j: m.transpose(i, j),
    "last two": lambda m, i, j: m.transpose(2, 3),
    "mT": lambda m, i, j: m.mT,
    "unsqueeze": lambda m, i, j: m.unsqueeze(i),
    "squeeze": lambda m, i, j: m.squeeze(i),
    "pad in front": lambda m, i, j: F.pad(m, (abs(i), 0), value=True),
    "pad behind": lambda m, i, j: F.pad(m, (0, abs(j))),
    "bool": lambda m, i, j: m.bool(),
    "float": lambda m, i, j: m.float(),
    "to bfloat16": lambda m, i, j: m.to(torch.bfloat16),
    "to int64": lambda m, i, j: m.to(torch.int64),
    "not": lambda m, i, j: ~m,
    "additive": lambda m, i, j: (1 - m.float()) * -10000.0,
    "shifted": lambda m, i, j: m - 0.5,
    "from": lambda m, i, j: m[..., abs(i) :],
    "sample": lambda m, i, j: m[i],
    "one sample": lambda m, i, j: m[:1],
    "expand": lambda m, i, j: m.expand(-1, -1, abs(i), -1),
    "clone": lambda m, i, j: m.clone(),
    "contiguous": lambda m, i, j: m.contiguous(),
    "flatten": lambda m, i, j: m.flatten(1),
    "sum": lambda m, i, j: m.sum(i),
    "any": lambda m, i, j: m.any(-1, keepdim=True),
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "&": lambda m, n: m & n,
    "*": lambda m, n: m * n,
    "mul": lambda m, n: m.mul(n),
    "torch.mul": torch.mul,
    "|": lambda m, n: m | n,
    "==": lambda m, n: m == n,
    "cat": lambda m, n: torch.cat([m, n], dim=-1),
    "where": lambda m, n: torch.where(n.bool(), m, n),
    "fill": lambda m, n: m.masked_fill(n, 0),
}
NAMES = st.one_of(*map(st.sampled_from, (list(UNARY), list(BINARY), ["&", "*", "mul"])))
START = (
    lambda m, *_: m,
    UNARY["keys"],
    UNARY["queries"],
    lambda m, *_: m.view(m.shape[0], 1, 1, -1).repeat(1, 1, m.shape[-1], 1),
    lambda m, *_: m.view(m.shape[0], 1, 1, -1).repeat(1, 1, m.shape[-1], 1).transpose(2, 3),
)
"""What blocks make of their mask first, and multiply."""


@tried(4)
@given(data=st.data())
def test_a_spread_mask_is_as_a_plain_one_in_every_operation(data: st.DataObject) -> None:
    batch = data.draw(st.sampled_from([2, 1, 3]), "B")
    length = data.draw(st.sampled_from([4, 5, 2, 1]), "S")
    shape = SHAPES[data.draw(st.sampled_from(list(SHAPES)))](batch, length)
    generator = torch.Generator().manual_seed(data.draw(seeds, "seed"))
    plain = (torch.rand(shape, generator=generator) < 0.6).expand(batch, length)
    plain = data.draw(st.sampled_from([plain, plain.float(), plain.half() - 1]))
    pool = [
        (operation(plain.as_subclass(SpreadMask), 0, 0), operation(plain, 0, 0))
        for operation in START
    ]
    for _ in range(data.draw(st.integers(2, 8), "operations")):
        pick = st.integers(0, len(pool) - 1)
        # What came last is most often gone on with, so that operations build on each other.
        first = pool[data.draw(st.just(len(pool) - 1) | pick)]
        name = data.draw(NAMES)
        if name == "view" and not isinstance(first[0], SpreadMask):
            continue  # whether there is one depends on strides, which are another's then
        if name in UNARY:
            i, j = data.draw(axes), data.draw(axes)
            operands, operation = [first], lambda m, i=i, j=j, name=name: UNARY[name](m, i, j)
            note(f"{name} {i, j} of {tuple(first[1].shape)}")
        else:
            second = pool[data.draw(pick)]
            operands, operation = [first, second], BINARY[name]
            note(f"{name} of {tuple(first[1].shape)}, {tuple(second[1].shape)}")
        try:
            expected = operation(*(plain for _, plain in operands))
        except NotImplementedError:
            continue  # & of floats, which as factors can be multiplied
        except (RuntimeError, IndexError, TypeError) as error:
            if name == "view":
                continue  # of a copy that is none here
            with pytest.raises(type(error)):
                operation(*(ours for ours, _ in operands)).clone()
            continue
        result = operation(*(ours for ours, _ in operands))
        event(type(result).__name__)
        assert_same(result, expected)
        pool.append((result, expected))


def assert_same(result: Tensor, expected: Tensor) -> None:
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    torch.testing.assert_close(plain(result), expected, rtol=0, atol=0, equal_nan=True)
    if expected.ndim == 4 and expected.shape[1] == 1:
        assert_means_the_same(result, expected)


def assert_means_the_same(result: Tensor, expected: Tensor) -> None:
    sizes = tuple(expected.shape)
    lengths = dict(zip(("batch", "heads", "q_len", "k_len"), sizes))
    try:
        wanted = read_mask(expected, **lengths)
    except MaskError:
        with pytest.raises(MaskError):
            read_mask(result, **lengths)
        return
    got = read_mask(result, **lengths)
    if isinstance(got, Opaque):
        # A float product is not looked at.
        assert isinstance(wanted, Opaque) or isinstance(result, OuterMask)
    else:
        assert torch.equal(rebuilt(got, sizes), rebuilt(wanted, sizes))


def plain(mask: Tensor) -> Tensor:
    return mask.laid_out() if isinstance(mask, OuterMask) else mask.as_subclass(Tensor)
