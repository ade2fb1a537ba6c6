"""Random calls of `attention`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import assume, event
from hypothesis import strategies as st
from torch import Tensor

from diffusers_fa3 import MaskError, attention, plan_packing
from diffusers_fa3.masks.packing import PackingPlan

from .contents import Content, key_padding, row_patterns, scatter
from .expected import sdpa
from .masks import Mask, Verdict, some_masks
from .tensors import DTYPES, Qkv, Sizes, scales, some_qkv, some_sizes


@dataclass(frozen=True)
class Call:
    sizes: Sizes
    qkv: Qkv
    mask: Mask | None
    scale: float | None
    causal: bool

    @property
    def verdict(self) -> Verdict:
        if self.mask is None or 0 in self.sizes:
            return "served"
        return self.mask.verdict

    @property
    def options(self) -> dict[str, Any]:
        return {"scale": self.scale, "causal": self.causal}

    def given(self) -> Tensor | None:
        """The mask as `attention` takes it, where a 2-D one is (B, Sk)."""
        if self.mask is None or self.mask.axes_2d == "bk":
            return None if self.mask is None else self.mask.given
        return self.mask.given[None, None]

    def rows_without_keys(self) -> Tensor:
        """(B, Sq, H) bool."""
        batch, heads, q_len, k_len = self.sizes
        if self.mask is None or self.mask.content.bias is not None:
            return torch.full((batch, q_len, heads), k_len == 0)
        return ~self.mask.seen.any(-1).transpose(1, 2)

    def plan(self, **options: bool) -> PackingPlan:
        assert self.mask is not None
        batch, heads, q_len, k_len = self.sizes
        return plan_packing(
            self.mask.given,
            batch=batch,
            heads=heads,
            q_len=q_len,
            k_len=k_len,
            axes_2d=self.mask.axes_2d,
            **options,
        )

    def default(self) -> Tensor:
        mask = None if self.mask is None else self.mask.for_sdpa
        return sdpa(*self.qkv.tensors, mask, **self.options)

    def exact(self) -> Tensor:
        """PyTorch's attention in float64, on the same numbers."""
        mask = None if self.mask is None else self.mask.for_sdpa
        wide = mask.double() if mask is not None and mask.is_floating_point() else mask
        return sdpa(*self.qkv.wide(), wide, **self.options)


@st.composite
def some_calls(
    draw: st.DrawFn,
    contents: Callable[[Sizes], st.SearchStrategy[Content]] | None = None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    layouts: list[str] | None = None,
) -> Call:
    sizes = draw(some_sizes())
    qkv = draw(some_qkv(sizes, dtypes, layouts))
    unmasked = contents is None and draw(st.sampled_from([False] * 7 + [True]))
    if unmasked:
        causal = sizes.q_len == sizes.k_len and draw(st.booleans())
        return Call(sizes, qkv, None, draw(scales), causal)
    mask = draw(some_masks(sizes, qkv.memories[0].dtype, contents))
    return Call(sizes, qkv, mask, draw(scales), causal=False)


WAYS: dict[str, dict[str, bool]] = {
    "any route": {},
    "without seqused": {"seqused": False},
    "static": {"static": True},
}


@dataclass(frozen=True)
class Planned:
    """A call with a mask, and a plan for it."""

    call: Call
    way: str
    plan: PackingPlan

    @property
    def seen(self) -> Tensor:
        """(B, Sq, Sk) bool."""
        assert self.call.mask is not None
        return self.call.mask.seen[:, 0]

    @property
    def launches(self) -> list[PackingPlan]:
        return [self.plan] if self.plan.also is None else [self.plan, self.plan.also]

    def attention(self, *tensors: Tensor) -> Tensor:
        result = attention(*tensors, self.plan, kernel="reference", **self.call.options)
        assert isinstance(result, Tensor)
        return result

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.pretty(self.call)
        printer.text(f", planned: {self.way}")


@st.composite
def some_planned_calls(draw: st.DrawFn, layouts: list[str] | None = None) -> Planned:
    """A call whose mask can be planned, and a plan of those that can be made."""
    contents = draw(st.sampled_from([key_padding, row_patterns, scatter]))
    call = draw(some_calls(contents, layouts=layouts))
    assert call.mask is not None
    plans = {}
    for way, options in WAYS.items():
        try:
            plans[way] = call.plan(**options)
        except MaskError:
            if call.mask.verdict == "served" and way != "static":
                raise
    assume(plans)
    way = draw(st.sampled_from(list(plans)))
    event(f"{plans[way].route}, {'once' if plans[way].also is None else 'twice'}")
    return Planned(call, way, plans[way])
