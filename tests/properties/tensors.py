"""Random q, k and v: sizes, heads, dtypes, and memory laid out in every way that occurs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

LONGEST = 40
"""Queries or keys: enough for several of each pattern, and little enough for thousands of calls."""


class Sizes(NamedTuple):
    batch: int
    heads: int
    q_len: int
    k_len: int


class Layout(NamedTuple):
    """A (B, S, H, D) tensor as a view of one that is laid out otherwise."""

    memory: Callable[[int, int, int, int], tuple[int, ...]]
    view: Callable[[Tensor, int, int, int, int], Tensor]
    disjoint: bool = True
    """Whether no two elements share memory."""


LAYOUTS = {
    "contiguous": Layout(lambda b, s, h, d: (b, s, h, d), lambda x, b, s, h, d: x),
    "heads first": Layout(lambda b, s, h, d: (b, h, s, d), lambda x, b, s, h, d: x.transpose(1, 2)),
    "tokens first": Layout(
        lambda b, s, h, d: (s, b, h, d), lambda x, b, s, h, d: x.transpose(0, 1)
    ),
    "one of q, k, v": Layout(lambda b, s, h, d: (b, s, 3, h, d), lambda x, b, s, h, d: x[:, :, 1]),
    "part of a head": Layout(lambda b, s, h, d: (b, s, h, d + 3), lambda x, b, s, h, d: x[..., 3:]),
    "some tokens": Layout(
        lambda b, s, h, d: (b, s + 3, h, d), lambda x, b, s, h, d: x[:, 1 : s + 1]
    ),
    "every second token": Layout(
        lambda b, s, h, d: (b, 2 * s, h, d), lambda x, b, s, h, d: x[:, ::2]
    ),
    "every second sample": Layout(lambda b, s, h, d: (2 * b, s, h, d), lambda x, *_: x[::2]),
    "some heads": Layout(
        lambda b, s, h, d: (b, s, h + 2, d), lambda x, b, s, h, d: x[:, :, 1 : h + 1]
    ),
    "channels before heads": Layout(lambda b, s, h, d: (b, s, d, h), lambda x, *_: x.mT),
    "every second channel": Layout(lambda b, s, h, d: (b, s, h, 2 * d), lambda x, *_: x[..., ::2]),
    "odd address": Layout(
        lambda b, s, h, d: (b * s * h * d + 1,), lambda x, b, s, h, d: x[1:].view(b, s, h, d)
    ),
    "one head for all": Layout(
        lambda b, s, h, d: (b, s, 1, d), lambda x, b, s, h, d: x.expand(-1, -1, h, -1), False
    ),
    "one sample for all": Layout(
        lambda b, s, h, d: (1, s, h, d), lambda x, b, s, h, d: x.expand(b, -1, -1, -1), False
    ),
    "one token for all": Layout(
        lambda b, s, h, d: (b, 1, h, d), lambda x, b, s, h, d: x.expand(-1, s, -1, -1), False
    ),
}
DISJOINT = [name for name, layout in LAYOUTS.items() if layout.disjoint]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Qkv:
    """The memory that q, k and v lie in, and the tensors themselves."""

    memories: tuple[Tensor, Tensor, Tensor]
    shapes: tuple[tuple[int, int, int, int], ...]
    layouts: tuple[str, str, str]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.seen_in(self.memories)

    def seen_in(self, memories: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v in memory like theirs: of another dtype, or of which gradients are asked."""
        q, k, v = (
            LAYOUTS[name].view(memory, *shape)
            for name, memory, shape in zip(self.layouts, memories, self.shapes)
        )
        return q, k, v

    def wide(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (x.double() for x in self.tensors)
        return q, k, v

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def __str__(self) -> str:
        said = zip("qkv", self.shapes, self.layouts)
        return f"{self.memories[0].dtype}: " + "; ".join(f"{n} {s}, {lay}" for n, s, lay in said)


lengths = st.one_of(
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.integers(1, LONGEST).map(lambda n: (n, n)),
    st.tuples(st.just(1), st.integers(0, LONGEST)),
    st.tuples(st.integers(0, LONGEST), st.just(1)),
    st.tuples(st.integers(20, LONGEST), st.integers(0, 4)),
    st.tuples(st.integers(0, 4), st.integers(20, LONGEST)),
    st.tuples(st.integers(1, LONGEST), st.integers(1, LONGEST)),
)
"""(Sq, Sk)."""

seeds = st.integers(0, 2**16)


@st.composite
def some_sizes(draw: st.DrawFn) -> Sizes:
    q_len, k_len = draw(lengths)
    return Sizes(draw(st.integers(1, 3)), draw(st.sampled_from([2, 1, 4, 6])), q_len, k_len)


@st.composite
def some_qkv(
    draw: st.DrawFn,
    sizes: Sizes,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    layouts: list[str] | None = None,
) -> Qkv:
    batch, heads, q_len, k_len = sizes
    dtype = draw(st.sampled_from(dtypes))
    kv_heads = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    dim = draw(st.sampled_from([8, 1, 5, 16, 40]))
    v_dim = draw(st.sampled_from([dim, 3, 24]))
    shapes = (
        (batch, q_len, heads, dim),
        (batch, k_len, kv_heads, dim),
        (batch, k_len, kv_heads, v_dim),
    )
    names = st.sampled_from(list(LAYOUTS) if layouts is None else layouts)
    q_name, k_name = draw(names), draw(names)
    chosen = (q_name, k_name, draw(st.sampled_from([k_name, "contiguous"]) | names))
    generator = torch.Generator().manual_seed(draw(seeds))
    q, k, v = (
        torch.randn(LAYOUTS[name].memory(*shape), generator=generator).to(dtype)
        for name, shape in zip(chosen, shapes)
    )
    return Qkv((q, k, v), shapes, chosen)


scales = st.sampled_from([None, 1, 0.1, 0.37])
