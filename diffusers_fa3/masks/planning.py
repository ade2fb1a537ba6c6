"""From a mask to the plan of its call: the route, the lengths, and the indices of kept tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_fa3.errors import InputError, MaskError
from diffusers_fa3.masks.meaning import AllValid, Band, Opaque, Sequence, Sequences, Valid
from diffusers_fa3.masks.packing import PackingPlan
from diffusers_fa3.masks.read import Axes2D, keys_by_structure, read_mask
from diffusers_fa3.options import Lengths


def plan_packing(
    mask: Tensor | None,
    *,
    batch: int,
    q_len: int,
    k_len: int,
    heads: int = 1,
    axes_2d: Axes2D = "bk",
    seqused: bool = True,
    static: bool = False,
    pack_queries: bool = False,
) -> PackingPlan:
    """The plan for one mask: reads it once, and builds everything a kernel must be told.

    A plan with `causal` or `window` set is for a kernel call with the same; one with `also` is for
    two calls, whose outputs are added. `attention` sees to both.

    Args:
        mask: what each query sees: None, or bool, int or additive float of shape (Sk), (B, Sk),
            (B, 1, 1, Sk), (B, H, 1, Sk), (B, 1, Sq, Sk) or (B, H, Sq, Sk); see
            `diffusers_fa3.masks.read.read_mask`. The plan's tensors lie on its device.
        batch: B.
        q_len: Sq.
        k_len: Sk.
        heads: H.
        axes_2d: "bk" reads a 2-D mask as (B, Sk), "qk" as (Sq, Sk).
        seqused: whether route seqused may be taken; a few kernels lack it.
        static: read nothing from the mask, which must then be bool or int, one row per sample. In
            a CUDA graph the plan is made again by every replay, from what the mask holds then.
        pack_queries: in self attention, where tokens are padding as keys, leave them out as
            queries, too: their rows of the output are 0 instead of what the default computes
            there. For those who know that nothing reads these rows. Not on route static.

    Raises:
        MaskError: the mask does not broadcast to (B, H, Sq, Sk), its values have no meaning, or
            packing cannot express it: it depends on the head, or on the query without a pattern, or
            is a bias; or, with `static`, might be such a one.
        InputError: a size below 0; `pack_queries` with more or fewer queries than keys.

    Example:
        >>> import torch
        >>> from diffusers_fa3 import attention, plan_packing
        >>> padding = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 0, 0, 0, 1, 1]])  # (B, Sk)
        >>> plan = plan_packing(padding, batch=2, q_len=6, k_len=6)
        >>> plan.route, plan.cu_seqlens_k.tolist(), plan.max_seqlen_k
        ('packed', [0, 4, 7], 4)
        >>> q, k, v = torch.randn(3, 2, 6, 4, 8)
        >>> torch.equal(attention(q, k, v, plan), attention(q, k, v, padding))
        True
    """
    if min(batch, heads, q_len, k_len) < 0:
        raise InputError(
            "batch, heads, q_len and k_len are 0 or more; got "
            f"{batch}, {heads}, {q_len} and {k_len}. Take them from the shapes of q and k"
        )
    if pack_queries and q_len != k_len:
        raise InputError(
            "pack_queries is for self attention, where tokens are queries and keys; got q_len "
            f"{q_len}, k_len {k_len}. Leave pack_queries out"
        )
    sizes = (batch, heads, q_len, k_len)
    options = {"seqused": seqused, "static": static, "pack_queries": pack_queries}
    plan = try_plan(mask, sizes, axes_2d=axes_2d, **options)
    if isinstance(plan, Opaque):
        raise MaskError(
            f"{plan.reason}; packing takes groups of queries that see the same keys, or bands. "
            "Use torch.nn.functional.scaled_dot_product_attention for this mask"
        )
    return plan


def try_plan(
    mask: Tensor | None,
    sizes: tuple[int, int, int, int],
    *,
    axes_2d: Axes2D,
    seqused: bool,
    static: bool = False,
    pack_queries: bool = False,
) -> PackingPlan | Opaque:
    """`plan_packing`, but a mask that packing cannot express gives `Opaque` instead of an error.

    `sizes` is (B, H, Sq, Sk); `pack_queries` needs Sq = Sk.
    """
    batch, heads, q_len, k_len = sizes
    if mask is None:
        return PackingPlan("dense", batch, q_len, k_len)
    lengths = {"batch": batch, "heads": heads, "q_len": q_len, "k_len": k_len}
    if static:
        keys = keys_by_structure(mask, **lengths, axes_2d=axes_2d)
        return keys if isinstance(keys, Opaque) else _plan_static(keys, batch, q_len, k_len)
    meaning = read_mask(mask, **lengths, axes_2d=axes_2d)
    if isinstance(meaning, Opaque):
        return meaning
    if isinstance(meaning, AllValid):
        return PackingPlan("dense", batch, q_len, k_len)
    if isinstance(meaning, Band):
        return _plan_band(meaning, batch, q_len, k_len)
    if isinstance(meaning, Sequences):
        assert mask is not None
        return _plan_sequences(meaning, batch, q_len, k_len, mask.device)
    if pack_queries and meaning.queries is None:
        meaning = replace(meaning, queries=meaning.keys, q_lens=meaning.k_lens)
    return _plan_valid(meaning, batch, q_len, k_len, seqused)


def _plan_band(band: Band, batch: int, q_len: int, k_len: int) -> PackingPlan:
    window = (band.left, band.right)
    if window == (-1, 0):
        return PackingPlan("band", batch, q_len, k_len, causal=True)
    first_key = max(k_len - q_len - band.left, 0) if band.left >= 0 else 0
    return PackingPlan("band", batch, q_len, k_len, window=window, first_key=first_key)


def _plan_sequences(
    meaning: Sequences, batch: int, q_len: int, k_len: int, device: torch.device
) -> PackingPlan:
    """One launch for causal groups, one for the others: `causal` applies to a whole launch."""
    sequences = list(_of_every_sample(meaning, batch))
    launches = [
        _plan_launch(group, causal, batch, q_len, k_len, device)
        for causal in (False, True)
        if (group := [s for s in sequences if s.causal == causal])
    ]
    return replace(launches[0], also=launches[1]) if launches[1:] else launches[0]


def _plan_launch(
    sequences: list[Sequence],
    causal: bool,
    batch: int,
    q_len: int,
    k_len: int,
    device: torch.device,
) -> PackingPlan:
    q_lens = [len(s.queries) for s in sequences]
    k_lens = [len(s.keys) for s in sequences]
    return PackingPlan(
        "packed",
        batch,
        q_len,
        k_len,
        Lengths(_ends(q_lens).to(device), _ends(k_lens).to(device), max(q_lens), max(k_lens)),
        indices_q=_unless_all(
            [s.queries + s.sample * q_len for s in sequences], batch * q_len, device
        ),
        indices_k=_unless_all(
            [s.keys + s.sample * k_len for s in sequences], batch * k_len, device
        ),
        causal=causal,
    )


def _of_every_sample(meaning: Sequences, batch: int) -> Iterator[Sequence]:
    if meaning.samples == batch:
        yield from meaning.sequences
        return
    for sample in range(batch):
        yield from (replace(sequence, sample=sample) for sequence in meaning.sequences)


def _ends(lens: list[int]) -> Tensor:
    return F.pad(torch.tensor(lens, device="cpu").cumsum(0), (1, 0)).int()


def _unless_all(positions: list[Tensor], total: int, device: torch.device) -> Tensor | None:
    """The positions of the rows to gather, on `device`; None if that is all rows, in order."""
    joined = torch.cat(positions)
    return None if torch.equal(joined, torch.arange(total, device="cpu")) else joined.to(device)


def _plan_valid(valid: Valid, batch: int, q_len: int, k_len: int, seqused: bool) -> PackingPlan:
    keys = valid.keys.expand(batch, -1)
    if seqused and valid.k_leading and valid.queries is None:
        return _plan_leading(keys, valid.k_lens, batch, q_len, k_len)

    k_lens = _each(valid.k_lens, batch)
    if valid.queries is None:
        q_lens: tuple[int, ...] = (q_len,) * batch
        ends_q = torch.arange(batch + 1, dtype=torch.int32, device=keys.device) * q_len
        indices_q = None
    else:
        queries = valid.queries.expand(batch, -1)
        q_lens = _each(valid.q_lens, batch)
        ends_q, indices_q = _cu_seqlens(queries), _indices(queries, sum(q_lens))
    return PackingPlan(
        "packed",
        batch,
        q_len,
        k_len,
        Lengths(ends_q, _cu_seqlens(keys), max(q_lens, default=0), max(k_lens, default=0)),
        indices_q=indices_q,
        indices_k=_indices(keys, sum(k_lens)),
    )


def _plan_leading(
    keys: Tensor, k_lens: tuple[int, ...], batch: int, q_len: int, k_len: int
) -> PackingPlan:
    end = max(*k_lens, 1)  # if no sample has keys, one is passed, with seqused_k 0
    plan = PackingPlan("seqused", batch, q_len, k_len, end_key=end if end < k_len else None)
    if min(k_lens) == end:
        return plan
    first = torch.arange(0, batch * k_len, k_len, device=keys.device)
    if 0 in k_lens:
        # Kernels that take samples end to end may read a sample without valid keys in the last tile
        # of the sample before it, so its values must be valid, too.
        first = torch.where(keys[:, 0], first, k_lens.index(max(k_lens)) * k_len)
    places = torch.arange(end, device=keys.device) * keys[:, :end]
    rows_v = (first[:, None] + places).flatten()
    lengths = Lengths(seqused_k=keys.sum(-1, dtype=torch.int32))
    return replace(plan, lengths=lengths, rows_v=rows_v)


def _plan_static(keys: Tensor, batch: int, q_len: int, k_len: int) -> PackingPlan:
    lens, indices_k = _valid_first(keys.expand(batch, -1))
    lengths = Lengths(seqused_k=lens.int())
    return PackingPlan("static", batch, q_len, k_len, lengths, indices_k=indices_k.flatten())


def _valid_first(keys: Tensor) -> tuple[Tensor, Tensor]:
    """How many keys of each sample are valid; and positions in B * Sk, (B, Sk), those in front.

    After a sample's valid keys comes its first one again and again. A sample without valid keys
    repeats the first valid key of the sample with the most.
    """
    batch, k_len = keys.shape
    every = torch.arange(batch * k_len, device=keys.device).view(batch, k_len)
    if not every.numel():
        return keys.sum(-1), every
    # Counts along keys tell all. inductor cannot have a sum or argmax over keys beside them: it
    # fuses these into the kernel that counts, and then has no code for them.
    counts = keys.cumsum(-1)
    lens = counts[:, -1]
    # Valid keys go to the front, in order; padding to column k_len, which is cut off.
    place = torch.where(keys, counts - 1, k_len)
    front = every.new_zeros(batch, k_len + 1).scatter_(-1, place, every)[:, :k_len]
    first = front[:, 0]
    rest = torch.where(lens > 0, first, first.index_select(0, lens.argmax(0, keepdim=True)))
    behind = torch.arange(k_len, device=keys.device) >= lens[:, None]
    return lens, torch.where(behind, rest[:, None], front)


def _each(lens: tuple[int, ...], batch: int) -> tuple[int, ...]:
    """One length per sample, also if one row of the mask serves all samples."""
    return lens if len(lens) == batch else lens * batch


def _cu_seqlens(valid: Tensor) -> Tensor:
    """int32 (B + 1,) `cu_seqlens` of `valid` (B, S).

    Computed on the mask's device: copying host counts there would synchronise.
    """
    return F.pad(valid.sum(-1).cumsum(0), (1, 0)).int()


def _indices(valid: Tensor, total: int) -> Tensor:
    """Positions in B * S of True in `valid`. `total` is known, so this reads nothing back."""
    return torch.nonzero_static(valid.flatten(), size=total).flatten()
