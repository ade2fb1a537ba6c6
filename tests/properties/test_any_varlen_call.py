"""Any call of `flash_attn_varlen_func` gives each sample what it would have by itself."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import close, oracle
from torch import Tensor

from diffusers_fa3 import flash_attn_varlen_func

from . import tried
from .tensors import scales, seeds

NO_WINDOW = (-1, -1)


@dataclass(frozen=True)
class Varlen:
    q: Tensor
    k: Tensor
    v: Tensor
    q_ends: list[int]
    k_ends: list[int]
    used: list[int] | None
    scale: float | None
    options: dict[str, Any]
    slack: int

    def run(self, **asked: Any) -> Any:
        q_ends, k_ends = (
            torch.tensor(ends, dtype=torch.int32) for ends in (self.q_ends, self.k_ends)
        )
        used = None if self.used is None else torch.tensor(self.used, dtype=torch.int32)
        return flash_attn_varlen_func(
            self.q,
            self.k,
            self.v,
            q_ends,
            k_ends,
            int(q_ends.diff().max()) + self.slack,
            int(k_ends.diff().max()) + self.slack,
            seqused_k=used,
            softmax_scale=self.scale,
            kernel="reference",
            **self.options,
            **asked,
        )

    @property
    def softmax_scale(self) -> float:
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale

    def largest_logit(self) -> float:
        """Or more: of a query and a key that are as long as any, and point the same way."""
        lengths = (x.double().norm(dim=-1).max().item() for x in (self.q, self.k) if x.numel())
        return self.softmax_scale * prod(lengths)

    def expected(self) -> tuple[Tensor, Tensor]:
        options = {
            "causal": self.options["causal"],
            "window": self.options["window_size"],
            "softcap": self.options["softcap"],
        }
        samples = []
        for i, (of_q, of_k) in enumerate(zip(pairwise(self.q_ends), pairwise(self.k_ends))):
            keys = slice(of_k[0], of_k[1] if self.used is None else of_k[0] + self.used[i])
            queries = self.q[slice(*of_q)]
            samples.append(
                oracle(queries, self.k[keys], self.v[keys], self.softmax_scale, **options)
            )
        outs, lses = zip(*samples)
        return torch.cat(outs), torch.cat(lses, dim=1)

    def __repr__(self) -> str:
        shapes = [tuple(x.shape) for x in (self.q, self.k, self.v)]
        return (
            f"Varlen({self.q.dtype}, {shapes}, {self.q_ends}, {self.k_ends}, used {self.used}, "
            f"scale {self.scale}, {self.options}, slack {self.slack})"
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))


lengths = st.sampled_from([0, 1, 2]) | st.integers(0, 9)


@st.composite
def some_varlen_calls(draw: st.DrawFn) -> Varlen:
    samples = draw(st.integers(1, 5))
    q_lens = [draw(lengths) for _ in range(samples)]
    # As many keys as queries is a case of its own to causal attention.
    alike = draw(st.booleans())
    k_lens = q_lens if alike else [draw(lengths) for _ in range(samples)]
    kv_heads, group = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3]))
    dim, v_dim = draw(st.sampled_from([8, 5])), draw(st.sampled_from([8, 3]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(seeds))
    q, k, v = (
        torch.randn(shape, generator=generator, dtype=dtype)
        for shape in (
            (sum(q_lens), kv_heads * group, dim),
            (sum(k_lens), kv_heads, dim),
            (sum(k_lens), kv_heads, v_dim),
        )
    )
    if draw(st.booleans()):
        q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    used = [draw(st.integers(0, n)) for n in k_lens] if draw(st.booleans()) else None
    window = st.tuples(st.integers(-1, 6), st.integers(-1, 6))
    return Varlen(
        q,
        k,
        v,
        _ends(q_lens),
        _ends(k_lens),
        used,
        draw(scales),
        {
            "causal": draw(st.booleans()),
            "window_size": draw(st.just(NO_WINDOW) | window),
            "softcap": draw(st.sampled_from([0.0, 0.0, 1.5])),
        },
        draw(st.sampled_from([0, 3])),
    )


def _ends(lens: list[int]) -> list[int]:
    return [sum(lens[:i]) for i in range(len(lens) + 1)]


@tried(3)
@given(call=some_varlen_calls())
def test_each_sample_is_served_by_itself(call: Varlen) -> None:
    want, want_lse = call.expected()
    logits = call.largest_logit()
    output = call.run()
    close(output, want, logits=logits)
    with_lse, lse = call.run(return_lse=True)
    close(with_lse, want, logits=logits)
    close(lse, want_lse, logits=logits)
    out = torch.full_like(output, torch.nan)
    assert call.run(out=out) is out
    assert torch.equal(out, output)
