"""Random calls of FlashAttention's function over a key-value cache."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

REFUSALS = {
    "window": "without window",
    "softcap": "without softcap",
    "float16": "got float16",
    "head sizes": "needs one head size",
    "rotary": "cannot take rotary_cos|rotary_cos of halves needs a head size",
    "leftpad": "cache_leftpad",
    "packed queries": "cu_seqlens_q|without varlen",
    "splits": "num_splits",
    "rows of a page table": "page_table and cache_batch_idx exclude",
    "pages": "page",
}
"""What not every kernel takes, and what the words of one match that does not."""
EXTRAS = (*tuple(REFUSALS)[:-1], "window", "window", "rotary")
"""What a call may have of these; what stands here more than once, more often."""


@dataclass
class Call:
    """A random call: how the cache lies in memory, and what is asked."""

    extras: set[str]
    q_lens: list[int]
    lens: list[int]
    new_lens: list[int]
    """Keys of each sample: in the cache, and new."""
    given: dict[str, Any]
    """The arguments of `flash_attn_with_kvcache`."""

    def __str__(self) -> str:
        told = {
            name: f"{tuple(value.shape)}" if isinstance(value, Tensor) else value
            for name, value in self.given.items()
        }
        return f"{self.extras or ''} of {self.q_lens}, {self.lens} + {self.new_lens}: {told}"

    def slots(self, sample: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Where these keys of a sample lie: indices of the first two axes of the cache."""
        table, rows = self.given.get("page_table"), self.given.get("cache_batch_idx")
        cache = self.given["k_cache"]
        place = torch.arange(first, end, device=cache.device)
        row = sample if rows is None else rows[sample]
        if table is None:
            return torch.full_like(place, row), place
        return table[row].long()[place // cache.shape[1]], place % cache.shape[1]


def draw(rng: random.Random, device: str) -> Call:
    """Numbers are from `rng`, contents of tensors from torch's own generator."""
    extras = {*rng.sample(EXTRAS, rng.choice([0, 0, 0, 1, 1, 2]))}
    if "rotary" in extras:  # with a window, builds differ in which positions the queries have
        extras.discard("window")
    dtype = torch.float16 if "float16" in extras else torch.bfloat16
    size = rng.choice([64, 64, 72, 128, 128, 256])
    v_size = size + 8 if "head sizes" in extras else size
    kv_heads = rng.choice([1, 2, 3])
    heads = kv_heads * rng.choice([1, 1, 2, 8])
    batch = rng.randint(1, 4)

    def ints(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    def ends(lens: list[int]) -> Tensor:
        return ints([sum(lens[:i]) for i in range(len(lens) + 1)])

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    # The cache: rows, or pages in any order.
    both = "rows of a page table" in extras
    page = rng.choice([1, 16, 48, 64, 128, 256]) if both or rng.random() < 0.25 else 0
    chosen = both or (not page and rng.random() < 0.3)
    rows = batch + rng.randint(0, 2) if chosen else batch
    capacity = rng.randint(30, 500)
    given: dict[str, Any] = {}
    shape = (rows, capacity)
    if page:
        pages = -(-capacity // page)
        capacity = pages * page
        shape = (rows * pages + 2, page)
        order = torch.randperm(shape[0], device=device)[: rows * pages]
        given["page_table"] = order.view(rows, pages).int()
        extras.add("pages")
    if chosen:
        given["cache_batch_idx"] = ints(rng.sample(range(rows), batch))
    # What no call may read would be seen by its size.
    given["k_cache"] = 30 * randn(*shape, kv_heads, size)
    given["v_cache"] = 30 * randn(*shape, kv_heads, v_size)

    # Queries and keys of each sample.
    q_len = min(rng.choice([1, 1, rng.randint(2, 20), rng.randint(65, 200)]), capacity)
    new = min(rng.choice([1, q_len, rng.randint(1, 40)]), capacity)
    new = new if "rotary" in extras or rng.random() < 0.5 else 0
    lens = [rng.choice([0, *6 * [rng.randint(0, capacity - new)]]) for _ in range(batch)]
    form = rng.choice(["int", "all", "each", "each"])
    if form == "all" and not new and "leftpad" not in extras:
        lens = [capacity] * batch
    elif form == "int":
        lens = lens[:1] * batch
        given["cache_seqlens"] = lens[0]
    else:
        given["cache_seqlens"] = ints(lens)
    q_lens, new_lens = [q_len] * batch, [new] * batch
    if "packed queries" in extras:
        # FlashAttention-3 does not append the new keys of a sample without queries.
        q_lens[1:] = [rng.randint(int(new > 0), q_len) for _ in q_lens[1:]]
        given |= {"q": randn(sum(q_lens), heads, size), "cu_seqlens_q": ends(q_lens)}
        given["max_seqlen_q"] = q_len
    else:
        given["q"] = randn(batch, q_len, heads, size)
    if new:
        shape = (batch, new)
        if "packed queries" in extras:
            new_lens = [rng.randint(1, new) for _ in new_lens]
            shape = (sum(new_lens),)
            given["cu_seqlens_k_new"] = ends(new_lens)
        given |= {"k": randn(*shape, kv_heads, size), "v": randn(*shape, kv_heads, v_size)}

    # Options.
    if rng.random() < 0.5:
        given["causal"] = True
    if rng.random() < 0.3:
        given["softmax_scale"] = 0.11
    if "window" in extras:
        both_sides = (rng.randint(0, 90), rng.randint(0, 60))
        left, right = rng.choice([both_sides, (both_sides[0], -1), (-1, both_sides[1])])
        given["window_size"] = (left, right)
    if "softcap" in extras:
        given["softcap"] = 3.0
    if "splits" in extras:
        given["num_splits"] = rng.choice([1, 3])
    out = rng.choice(["", "whole", "strided"])
    if out:
        times = 1 if out == "whole" else 2
        shape = (*given["q"].shape[:-2], heads * times, v_size)
        given["out"] = torch.full(shape, torch.nan, dtype=dtype, device=device)[..., ::times, :]
    asked = rng.choice(["", "return_lse", "return_softmax_lse"])
    if asked:
        given[asked] = True
    if "leftpad" in extras:
        given["cache_leftpad"] = ints([rng.randint(0, n) for n in lens])
    if "rotary" in extras:
        width = rng.choice([16, 64, size // 16 * 16])
        angles = 6.3 * torch.rand(capacity + q_len, width // 2, device=device)
        given |= {"rotary_cos": angles.cos().to(dtype), "rotary_sin": angles.sin().to(dtype)}
        given["rotary_interleaved"] = rng.random() < 0.5
        if rng.random() < 0.3:
            given["rotary_seqlens"] = ints([rng.randint(0, n) for n in lens])

    call = Call(extras, q_lens, lens, new_lens, given)
    for sample, length in enumerate(lens):
        for cache in (given["k_cache"], given["v_cache"]):
            part = cache[call.slots(sample, 0, length)]
            cache[call.slots(sample, 0, length)] = randn(*part.shape)
    return call
