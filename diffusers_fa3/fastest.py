"""kernel="fastest": the kernels that "auto" may take and PyTorch's attention compete once per kind.

All who compete are exact, so time alone may choose. They take turns on the first call's own
tensors; the fastest serves that call and later ones of its kind.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from diffusers_fa3.attention import Declined, Served, attend, default_attention, plan_of
from diffusers_fa3.errors import InputError
from diffusers_fa3.inputs import check_inputs, under_autocast
from diffusers_fa3.kernels import (
    Choice,
    KernelChoice,
    Request,
    in_functional,
    is_functional,
    needs_grad,
    races,
    read_machine,
    rivals,
    select,
)
from diffusers_fa3.masks import Opaque, PackingPlan, Plan, PlanCall, as_4d

FASTEST, DEFAULT = "fastest", "default"
"""What a user asks for; and PyTorch's attention, among the names of kernels."""


class Kind(NamedTuple):
    """What calls have in common that have one fastest kernel. Numbers of tokens are in buckets."""

    device: torch.device
    request: Request
    batch: int
    heads: int
    k_heads: int
    q_len: int
    k_len: int
    causal: bool
    has_default: bool
    """Whether PyTorch's attention competes."""
    route: str = ""
    """Of the mask; the rest too. Empty without one."""
    q_tokens: int = 0
    k_tokens: int = 0


def attend_fastest(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | PackingPlan | None,
    *,
    kernel: KernelChoice = FASTEST,
    out: Tensor | None = None,
    out_is_ours: bool = False,
    **call: Any,
) -> Served | Declined:
    """`attend` by the fastest; arguments are those of `attend`, and `kernel` is "fastest".

    A call that PyTorch's attention is to serve comes back as `Declined`, with its `lead`. Nothing
    is timed in graphs, in transforms, and where gradients are needed: what is known serves there,
    or else what "auto" takes.
    """
    into: dict[str, Any] = {"out": out, "out_is_ours": out_is_ours}
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return attend(q, k, v, mask, kernel=kernel, **into, **call)
    seen = None if isinstance(mask, PackingPlan) else _sizes(q, k, v, mask, call)
    choice = None if seen is None else races.known(seen)
    if choice is None:
        choice = _choose(q, k, v, mask, call)
        if choice is None:
            return attend(q, k, v, mask, kernel="auto", **into, **call)
        if seen is not None and (mask is None or _for_any_mask(q, k, v, seen, choice, call)):
            races.remember(seen, choice)
    if choice.name == DEFAULT:
        return Declined(str(_CHOSEN), _CHOSEN, choice.lead)
    answer = attend(q, k, v, mask, kernel=choice.name, **into, **call)
    if isinstance(answer, Declined):  # it cannot do what "auto"'s can, such as gradients
        return attend(q, k, v, mask, kernel="auto", **into, **call)
    return answer._replace(lead=choice.lead)


_CHOSEN = InputError("the default is the fastest in calls of this kind")
"""Never raised."""


def _sizes(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: dict[str, Any]
) -> tuple[object, ...] | None:
    """What tells calls apart at once, without the content of a mask; None where it takes more."""
    if torch._C._is_any_autocast_enabled() or in_functional():
        return None
    tensors = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device)
    sizes = (*tensors, call["causal"], call.get("return_lse"))
    if mask is None:
        return sizes
    return (*sizes, mask.shape, mask.dtype, mask.device, call.get("axes_2d"))


def _for_any_mask(
    q: Tensor, k: Tensor, v: Tensor, seen: object, choice: Choice, call: dict[str, Any]
) -> bool:
    """Whether the default is the fastest whatever a mask holds, so that none need be read.

    Its time is the same for all. A kernel has least to do where a mask leaves one key: the default
    that beats it there beats it everywhere.
    """
    if choice.name != DEFAULT or not _may_time(q, k, v):
        return False
    lightest = races.known((seen, "one key"))
    if lightest is None:
        one_key = torch.zeros(len(q), k.shape[1], dtype=torch.bool, device=q.device)
        one_key[:, 0] = True
        plans: dict[PlanCall, Plan] = {}  # made once, as in a model

        def find_plan(mask: Tensor, planned: PlanCall, make: Callable[[], Plan]) -> Plan:
            return plans.get(planned) or plans.setdefault(planned, make())

        told = {**call, "axes_2d": "bk", "pack_queries": False, "find_plan": find_plan}
        lightest = _choose(q, k, v, one_key, told)
        if lightest is None:
            return False
        races.remember((seen, "one key"), lightest)
    return lightest.name == DEFAULT


def _choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | PackingPlan | None,
    call: dict[str, Any],
) -> Choice | None:
    """Who serves: by what is known, or by a race; None where "auto" decides."""
    causal, return_lse = call["causal"], call.get("return_lse", False)
    axes_2d = call.get("axes_2d", "bk")
    q, k, v = under_autocast(q, k, v)
    sizes = check_inputs(q, k, v, mask, causal)
    request = Request(q.dtype, q.shape[-1], v.shape[-1], varlen=mask is not None, lse=return_lse)
    names = rivals(request, read_machine(q.device))
    if not names or 0 in sizes or (in_functional() and is_functional(q, k, v)):
        return None
    has_default = not (return_lse or isinstance(mask, PackingPlan))
    kind = _kind(request, q, k, causal, has_default)
    if mask is not None:
        planned = _kind_of_masked(kind, mask, sizes, call)
        if planned is None:
            return None
        kind = planned
    choice = races.known(kind)
    if choice is not None or not _may_time(q, k, v):
        return choice

    def serves(name: str) -> bool:
        if name == DEFAULT:
            plain = cast(Tensor | None, mask)
            plain = None if plain is None else as_4d(plain, sizes, axes_2d)
            default_attention(q, k, v, plain, call["scale"], causal)
            return True
        return isinstance(attend(q, k, v, mask, kernel=name, **call), Served)

    names = (*names, DEFAULT) if has_default else names
    return races.decide(kind, {name: partial(serves, name) for name in names}, q.device)


def _kind(request: Request, q: Tensor, k: Tensor, causal: bool, has_default: bool) -> Kind:
    batch, q_len, heads, _ = q.shape
    lengths = bucket(q_len), bucket(k.shape[1])
    return Kind(q.device, request, batch, heads, k.shape[2], *lengths, causal, has_default)


def _kind_of_masked(
    kind: Kind,
    mask: Tensor | PackingPlan,
    sizes: tuple[int, int, int, int],
    call: dict[str, Any],
) -> Kind | None:
    """What the plan adds, by which "auto" takes the call; None where it does not take it."""
    plan: Plan
    if isinstance(mask, PackingPlan):
        plan = mask
    else:
        chosen = select(kind.request, read_machine(kind.device))
        plan = plan_of(
            mask,
            sizes,
            call.get("axes_2d", "bk"),
            chosen.seqused_k,
            call.get("pack_queries", False),
            call.get("find_plan"),
        )
    if isinstance(plan, Opaque):
        return None
    batch, _, q_len, k_len = sizes
    keys = (k_len if plan.end_key is None else plan.end_key) - plan.first_key
    q_tokens = batch * q_len if plan.indices_q is None else len(plan.indices_q)
    k_tokens = batch * keys if plan.indices_k is None else len(plan.indices_k)
    return kind._replace(
        causal=kind.causal or plan.causal,
        route=plan.route,
        q_tokens=bucket(q_tokens),
        k_tokens=bucket(k_tokens),
    )


def bucket(number: int) -> int:
    """The number, rounded down to its three highest bits: four buckets to the next power of 2."""
    low = max(0, number.bit_length() - 3)
    return number >> low << low


def _may_time(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether calls may be timed: without gradients, and in no CUDA graph, which may not wait."""
    captured = q.is_cuda and torch.cuda.is_current_stream_capturing()
    return not (captured or needs_grad(q, k, v))
