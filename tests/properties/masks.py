"""Random masks: contents, written down in some way; and whether a kernel must take them.

What a mask says may be spelled as bools, ints or additive floats, spread over any axes, and lie in
memory in any way. Of all that only the content may matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

from diffusers_fa3.masks.read import Axes2D
from diffusers_fa3.masks.rows import COPIES

from .contents import Content, biases, key_padding, per_head, row_patterns, scatter, scattered
from .tensors import Sizes

Verdict = Literal["served", "refused", "either"]


@dataclass(frozen=True)
class Mask:
    """A mask as it is given, and the same said in full."""

    content: Content
    given: Tensor
    axes_2d: Axes2D
    sizes: Sizes
    how: str

    @property
    def seen(self) -> Tensor:
        """(B, H, Sq, Sk) bool."""
        return self.content.seen.expand(self.sizes)

    @property
    def for_sdpa(self) -> Tensor:
        """What PyTorch's attention makes the same of."""
        mask = self.given if self.given.ndim == 3 else self.four_axes
        return mask if mask.is_floating_point() else mask.bool()

    @property
    def four_axes(self) -> Tensor:
        """A view of it, with axes (B, H, Sq, Sk) or 1 for any."""
        if self.given.ndim == 2 and self.axes_2d == "bk":
            return self.given[:, None, None]
        return self.given[(None,) * (4 - self.given.ndim)]

    @property
    def verdict(self) -> Verdict:
        """Whether a kernel must take it, must not, or need not and will say why."""
        content, given = self.content, self.given
        if given.numel() == 0:
            return "served"
        if content.bias is not None:
            return "refused"
        seen = content.seen
        if given.is_floating_point():
            # Such a row is averaged over what is least masked in it, by the default attention.
            no_key = (given != 0).all(-1)
            if (no_key & (given.amax(-1) > -torch.inf)).any():
                return "refused"
        if not seen.equal(seen[:, :1].expand_as(seen)):
            return "refused"
        return _verdict_on_rows(seen[:, 0], content)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def __str__(self) -> str:
        head = f"{self.content.kind}; {self.how}; {self.given.dtype}, strides {self.given.stride()}"
        rows = [
            "|".join("".join("01"[int(x)] for x in row) for row in sample)
            for head_rows in self.content.seen.tolist()
            for sample in head_rows
        ]
        return f"{head}, {tuple(self.given.shape)} as {self.axes_2d}: {rows}"


def _verdict_on_rows(seen: Tensor, content: Content) -> Verdict:
    """By how often keys must be copied to pack groups of rows that see alike: `COPIES` go."""
    outer = seen.any(-1, keepdim=True) & seen.any(-2, keepdim=True)
    if seen.equal(outer):
        return "served"
    samples, q_len, k_len = seen.shape
    if content.promise == "band":
        first = seen[:1].expand_as(seen)
        ends_see = bool(seen[0, 0].any() and seen[0, -1].any())
        if seen.equal(first) and ends_see:
            return "served"
    if content.promise == "groups":
        return "served"
    counts = seen.sum(-1)
    news = torch.ones(samples, q_len, dtype=torch.bool)
    news[:, 1:] = (seen[:, 1:] != seen[:, :-1]).any(-1)
    if (counts[:, 1:] == counts[:, :-1] + 1).any():
        # A row may be taken for the causal continuation of the one above, and is then packed
        # with it, even where it could share a group elsewhere.
        cost = int((counts * news).sum())
    else:
        cost = sum(int(sample.unique(dim=0).sum()) for sample in seen)
    if cost <= COPIES * samples * k_len:
        return "served"
    return "refused" if content.scatter else "either"


@st.composite
def some_masks(
    draw: st.DrawFn,
    sizes: Sizes,
    dtype: torch.dtype,
    contents: Callable[[Sizes], st.SearchStrategy[Content]] | None = None,
) -> Mask:
    """A mask for q of `dtype`, in any spelling, shape and layout."""
    kinds = (key_padding, row_patterns, row_patterns, scatter, per_head, biases)
    content = draw(
        st.one_of(*(kind(sizes) for kind in kinds)) if contents is None else contents(sizes)
    )
    spelling, values = _spelled(draw, content, dtype)
    spread, given = _spread(draw, values, sizes)
    shape, given, axes_2d = _shaped(draw, given)
    return Mask(content, given, axes_2d, sizes, f"{spelling}; {spread}; {shape}")


def _spelled(draw: st.DrawFn, content: Content, dtype: torch.dtype) -> tuple[str, Tensor]:
    additive = draw(st.sampled_from([dtype, torch.float32]))  # SDPA takes no other
    if content.bias is not None:
        return "added", content.bias.to(additive)
    seen = content.seen
    spelling = draw(st.sampled_from(["bool", "-inf", "-1e4", "lowest", "int64", "int32", "uint8"]))
    if spelling == "bool":
        return spelling, seen
    if spelling.endswith(("int64", "int32", "int8")):
        return spelling, seen.to(getattr(torch, spelling))
    zero = draw(st.sampled_from([0.0, -0.0]))
    fill = torch.finfo(additive).min if spelling == "lowest" else float(spelling)
    values = torch.full(seen.shape, zero, dtype=additive).masked_fill(~seen, fill)
    if spelling == "-inf" and draw(st.booleans()):
        # some of the masked values finite: as where masks were added up
        values = torch.where(scattered(draw, *seen.shape), values, values.clamp(min=-3e4))
    return spelling, values


def _spread(draw: st.DrawFn, values: Tensor, sizes: Sizes) -> tuple[str, Tensor]:
    """Over axes along which nothing differs: as memory, or as a view; and in any order."""
    memory = draw(st.sampled_from(["contiguous", "transposed", "part of rows", "every second key"]))
    axes = draw(st.sampled_from(["", "b", "h", "q", "bhq"]))
    wanted = [
        full if axis in axes else got for axis, got, full in zip("bhq", values.shape[:3], sizes[:3])
    ]
    wanted.append(sizes.k_len)
    expanded = draw(st.booleans())
    if not expanded:
        values = values.expand(wanted).contiguous()
    match memory:
        case "transposed":
            values = values.mT.contiguous().mT
        case "part of rows":
            room = values.new_zeros((*values.shape[:-1], values.shape[-1] + 3))
            room[..., 1:-2] = values
            values = room[..., 1:-2]
        case "every second key":
            room = values.new_ones((*values.shape[:-1], 2 * values.shape[-1]))
            room[..., ::2] = values
            values = room[..., ::2]
    return f"{memory}{', expanded' if expanded else ''}", values.expand(wanted)


def _shaped(draw: st.DrawFn, given: Tensor) -> tuple[str, Tensor, Axes2D]:
    """With as few axes as say the same, or four."""
    b, h, q, k = given.shape
    if k > 1 and given.equal(given[..., :1].expand_as(given)) and draw(st.booleans()):
        given = given[..., :1]
    shapes: dict[str, tuple[Tensor, Axes2D]] = {"4 axes": (given, "bk")}
    if b == 1:
        shapes["(H, Sq, Sk)"] = (given[0], "bk")
    if h == q == 1:
        shapes["(B, Sk)"] = (given[:, 0, 0], "bk")
    if b == h == 1:
        shapes["(Sq, Sk)"] = (given[0, 0], "qk")
    if b == h == q == 1:
        shapes["(Sk)"] = (given[0, 0, 0], "bk")
    shape = draw(st.sampled_from(list(reversed(shapes))))
    return shape, *shapes[shape]
