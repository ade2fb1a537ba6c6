"""Random contents of masks: what each query sees, whatever it is that says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

from .tensors import Sizes, seeds

Promise = Literal["", "groups", "band"]
"""Why rows must be taken whatever packing them costs: they see alike or each one key more than the
one above, in a few groups; or they are one band."""


@dataclass(frozen=True)
class Content:
    """What a mask says, with axes (B, H, Sq, Sk) of full size, or 1 where nothing differs."""

    kind: str
    seen: Tensor
    bias: Tensor | None = None
    promise: Promise = ""
    scatter: bool = False
    """Rows are random, of an even number of keys each: nothing that could be taken for causal."""


# --- keys of one sample ------------------------------------------------------------------------


@st.composite
def some_keys(draw: st.DrawFn, k_len: int) -> tuple[str, Tensor]:
    """Which keys of a sample are valid, (Sk)."""
    kind = draw(st.sampled_from(["right", "left", "gap", "scattered", "all", "none"]))
    at = torch.arange(k_len)
    count = draw(st.integers(0, k_len)) if kind in ("right", "left", "gap") else 0
    match kind:
        case "right":
            keys = at < count
        case "left":
            keys = at >= count
        case "gap":
            keys = (at < count) | (at >= draw(st.integers(count, k_len)))
        case "scattered":
            keys = scattered(draw, k_len)
        case "all":
            keys = at >= 0
        case _:
            keys = at < 0
    return kind, keys


def scattered(draw: st.DrawFn, *shape: int) -> Tensor:
    """Bools at random, of which about half, few or most are true."""
    generator = torch.Generator().manual_seed(draw(seeds))
    share = draw(st.sampled_from([0.5, 0.1, 0.9]))
    return torch.rand(shape, generator=generator) < share


# --- rows of one sample ------------------------------------------------------------------------

Rows = tuple[str, Tensor, Promise]


@st.composite
def some_rows(draw: st.DrawFn, q_len: int, k_len: int) -> Rows:
    """What each query of a sample sees, (Sq, Sk)."""
    kinds = _SQUARE if q_len == k_len else _ANY
    kind, rows, promise = kinds[draw(st.sampled_from(list(kinds)))](draw, q_len, k_len)
    if rows.numel() and draw(st.sampled_from([False] * 4 + [True])):
        # As many keys as before, which is what a pattern is guessed from, but others.
        row = draw(st.integers(0, q_len - 1))
        rows[row] = rows[row].roll(draw(st.integers(1, 3)))
        return f"{kind}, but for row {row}", rows, ""
    return kind, rows, promise


def _diagonal(draw: st.DrawFn, q_len: int, k_len: int) -> int:
    """Aligned at the end, as kernels have it; at the beginning, as SDPA; or anywhere."""
    anywhere = st.integers(-q_len, k_len)
    return draw(st.sampled_from([k_len - q_len, 0, -1]) | anywhere)


def _causal(draw: st.DrawFn, q_len: int, k_len: int) -> Rows:
    d = _diagonal(draw, q_len, k_len)
    return f"causal at {d}", _full(q_len, k_len).tril(d), "groups"


def _band(draw: st.DrawFn, q_len: int, k_len: int) -> Rows:
    left, right = (draw(st.integers(0, 3) | st.integers(0, n)) for n in (max(q_len, k_len), k_len))
    d = k_len - q_len
    return f"band {left, right}", _full(q_len, k_len).tril(d + right).triu(d - left), "band"


def _outer(draw: st.DrawFn, q_len: int, k_len: int) -> Rows:
    (q_kind, queries), (k_kind, keys) = draw(some_keys(q_len)), draw(some_keys(k_len))
    return f"outer({q_kind}, {k_kind})", queries[:, None] & keys, ""


def _forced_column(draw: st.DrawFn, q_len: int, k_len: int) -> Rows:
    kind, rows, _ = _outer(draw, q_len, k_len)
    column = draw(st.integers(0, max(k_len - 1, 0)))
    return f"{kind} and key {column}", rows | (torch.arange(k_len) == column), ""


def _segments(draw: st.DrawFn, q_len: int, k_len: int) -> Rows:
    most = draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(seeds))
    queries, keys = (torch.randint(most, (n,), generator=generator) for n in (q_len, k_len))
    if draw(st.booleans()):
        queries, keys = queries.sort().values, keys.sort().values
    return f"{most} segments", queries[:, None] == keys, ""


def _groups(draw: st.DrawFn, q_len: int, k_len: int) -> Rows:
    """Of queries that see alike, mixed; the sizes of what they see are often next to each other."""
    most = draw(st.integers(2, 5))
    generator = torch.Generator().manual_seed(draw(seeds))
    seen = torch.rand(most, k_len, generator=generator) < draw(st.sampled_from([0.5, 0.1]))
    return f"{most} groups", seen[torch.randint(most, (q_len,), generator=generator)], ""


def _frames(draw: st.DrawFn, q_len: int, k_len: int) -> Rows:
    q_frame, k_frame = draw(st.integers(1, 10)), draw(st.integers(1, 10))
    queries, keys = torch.arange(q_len) // q_frame, torch.arange(k_len) // k_frame
    return f"frames of {q_frame} and {k_frame}", queries[:, None] >= keys, ""


def _padded_causal(draw: st.DrawFn, q_len: int, k_len: int) -> Rows:
    d = _diagonal(draw, q_len, k_len)
    kind, keys = draw(some_keys(k_len))
    promise: Promise = "groups" if kind in ("right", "left") else ""
    return f"causal at {d}, {kind}", _full(q_len, k_len).tril(d) & keys, promise


def _text_and_image(draw: st.DrawFn, length: int, _: int) -> Rows:
    pads = draw(st.integers(0, length))
    image = draw(st.integers(pads, length))
    rows = _full(length, length)
    rows[pads:, :pads] = False
    rows[pads:image] = rows[pads:image].tril(pads)
    return f"{pads} pads, causal up to {image}", rows, "groups"


def _full(q_len: int, k_len: int) -> Tensor:
    return torch.ones(q_len, k_len, dtype=torch.bool)


_ANY: dict[str, Callable[[st.DrawFn, int, int], Rows]] = {
    "causal": _causal,
    "band": _band,
    "outer": _outer,
    "forced column": _forced_column,
    "segments": _segments,
    "groups": _groups,
    "frames": _frames,
    "padded causal": _padded_causal,
}
_SQUARE = {**_ANY, "text and image": _text_and_image}


# --- a whole mask ------------------------------------------------------------------------------


@st.composite
def key_padding(draw: st.DrawFn, sizes: Sizes) -> Content:
    """The same for every query."""
    samples = draw(st.sampled_from([sizes.batch, 1]))
    each = [draw(some_keys(sizes.k_len)) for _ in range(samples)]
    seen = torch.stack([keys for _, keys in each])[:, None, None]
    return Content(" + ".join(kind for kind, _ in each), seen)


@st.composite
def row_patterns(draw: st.DrawFn, sizes: Sizes) -> Content:
    """Differing from query to query, in one way for all samples, or each in its own."""
    each = [
        draw(some_rows(sizes.q_len, sizes.k_len))
        for _ in range(draw(st.sampled_from([1, sizes.batch])))
    ]
    promises = {promise for *_, promise in each}
    return Content(
        " + ".join(kind for kind, *_ in each),
        torch.stack([rows for _, rows, _ in each])[:, None],
        promise=promises.pop() if len(promises) == 1 else "",
    )


@st.composite
def scatter(draw: st.DrawFn, sizes: Sizes) -> Content:
    """No pattern at all, but an even number of keys in each row."""
    samples = draw(st.sampled_from([1, sizes.batch]))
    seen = scattered(draw, samples, 1, sizes.q_len, sizes.k_len)
    odd_key = seen & (seen.cumsum(-1) == 1) & (seen.sum(-1, keepdim=True) % 2 == 1)
    return Content("scatter", seen & ~odd_key, scatter=True)


@st.composite
def per_head(draw: st.DrawFn, sizes: Sizes) -> Content:
    """Heads that may differ."""
    one = draw(key_padding(sizes) | row_patterns(sizes) | scatter(sizes))
    other = draw(key_padding(sizes) | row_patterns(sizes))
    which = torch.arange(sizes.heads)[:, None, None] == draw(st.integers(0, sizes.heads - 1))
    return Content(f"{one.kind}, a head {other.kind}", torch.where(which, other.seen, one.seen))


@st.composite
def biases(draw: st.DrawFn, sizes: Sizes) -> Content:
    """Values that are added to logits and mean no mask."""
    full = draw(st.sampled_from(["", "b", "h", "q", "bhq"]))
    shape = [n if axis in full else 1 for axis, n in zip("bhq", sizes[:3])] + [sizes.k_len]
    generator = torch.Generator().manual_seed(draw(seeds))
    kind = draw(st.sampled_from(["normal", "0 and 1", "-9e3", "one value"]))
    match kind:
        case "normal":
            bias = torch.randn(shape, generator=generator)
        case "0 and 1":
            bias = (torch.rand(shape, generator=generator) < 0.5).float()
            bias.view(-1)[:1] = 1.0
        case "-9e3":
            bias = torch.where(torch.rand(shape, generator=generator) < 0.5, 0.0, -9e3)
            bias.view(-1)[-1:] = -9e3
        case _:
            bias = torch.zeros(shape)
            bias.view(-1)[-1:] = -0.5
    return Content(f"bias, {kind}", torch.ones(shape, dtype=torch.bool), bias=bias)
