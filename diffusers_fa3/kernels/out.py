"""One `out` contract for every kernel, whether or not the kernel has heard of `out`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffusers_fa3.errors import InputError, KernelUnavailableError
from diffusers_fa3.kernels.signature import Signature, read_signature

_Q_NAMES = ("q", "query")
_V_NAMES = ("v_cache", "v", "value")


def call_kernel(
    kernel: Callable[..., Any],
    *args: Any,
    out: Tensor | None = None,
    return_lse: bool = False,
    **kwargs: Any,
) -> Any:
    """Call `kernel`; where `out` is given, the result is in it afterwards, and it is returned.

    The kernel writes into `out` by itself where its schema or signature has an argument of that
    name and `out` is laid out for it (last axis dense, address and strides multiples of 16 bytes);
    otherwise its result is copied. It is called once, and what it raises is not touched.

    Args:
        kernel: any callable: a Python function, a `torch.ops` packet or overload, a partial, ...
        *args: its arguments, q, k and v first unless they are given by name.
        out: q's shape with v's head size; q's dtype (bfloat16 for float8); on q's device.
        return_lse: also ask for the log-sum-exp, by the name that this kernel has for it.
        **kwargs: further arguments, as the kernel calls them.

    Returns:
        What the kernel returns: a tensor, or a tuple whose first member is the result. With `out`,
        `out` takes the result's place, and a tuple keeps its other members.

    Raises:
        InputError: an unfit `out` (see `check_out`), before the kernel runs; or a kernel whose
            `out` is bound already.
        KernelUnavailableError: `return_lse` asked of a kernel that returns none.

    Example:
        >>> import torch
        >>> from diffusers_fa3 import call_kernel
        >>> def kernel(q, k, v):  # has never heard of `out`
        ...     return (q @ k.transpose(-1, -2)).softmax(-1) @ v
        >>> q, k, v = torch.randn(3, 2, 4, 8)
        >>> out = torch.empty_like(q)
        >>> call_kernel(kernel, q, k, v, out=out) is out
        True
        >>> torch.equal(out, kernel(q, k, v))
        True
    """
    signature = read_signature(kernel)
    if return_lse:
        kwargs |= _lse_request(kernel, signature)
    if out is not None:
        _check_call(kernel, signature, out, args, kwargs)
    result = invoke(kernel, *args, out=out, **kwargs)
    if return_lse and not (isinstance(result, (tuple, list)) and len(result) > 1):
        raise KernelUnavailableError(
            f"{name_of(kernel)} returned no log-sum-exp, but one result; with `return_lse` a "
            "kernel returns (out, lse). Call without, or take another kernel"
        )
    return result


def invoke(kernel: Callable[..., Any], *args: Any, out: Tensor | None = None, **kwargs: Any) -> Any:
    """`call_kernel` for an `out` that `check_out` has seen already."""
    if out is None:
        return kernel(*args, **kwargs)
    signature = read_signature(kernel)
    if "out" not in signature.names or not fits_kernels(out):
        return deliver(kernel(*args, **kwargs), out)
    if "out" in signature.positional[: len(args)]:
        place = signature.positional.index("out")
        args = (*args[:place], out, *args[place + 1 :])
        return deliver(kernel(*args, **kwargs), out)
    return deliver(kernel(*args, out=out, **kwargs), out)


def fits_kernels(out: Tensor) -> bool:
    """Whether a kernel can write into `out`: what the dense entries, which store by TMA, need."""
    size = out.element_size()
    rows = zip(out.shape[:-1], out.stride()[:-1], strict=True)
    return (
        (out.stride(-1) == 1 or out.shape[-1] == 1)
        and out.data_ptr() % 16 == 0
        and all(stride * size % 16 == 0 for length, stride in rows if length > 1)
    )


def deliver(result: Any, out: Tensor) -> Any:
    """A kernel's `result` with `out` in the place of its first tensor, and of its values.

    Kernels that take `out` do not all fill it: FlashAttention-2's decode path works on a reshaped
    copy. So the returned tensor decides, not the promise.
    """
    if isinstance(result, (tuple, list)) and result:
        return (_place(result[0], out), *result[1:])
    return _place(result, out)


def _place(first: Tensor | Any, out: Tensor) -> Tensor:
    if first is out:
        return out
    if not isinstance(first, Tensor):
        raise InputError(
            f"a kernel must return a tensor; got {type(first).__name__}. Mend the function that is "
            "given as kernel"
        )
    if first.shape != out.shape:
        raise InputError(
            f"the kernel returned shape {tuple(first.shape)}; out has {tuple(out.shape)}. "
            "A kernel returns (..., H, Dv), as q and v say"
        )
    if first.data_ptr() == out.data_ptr() and first.stride() == out.stride():
        return out
    return out.copy_(first.clone() if _overlap(first, out) else first)


def check_out(out: Tensor, q: Tensor, v: Tensor, others: Sequence[Tensor | None] = ()) -> None:
    """Refuse an `out` that cannot receive the attention of `q` over `v`.

    Memory is compared by the range from a tensor's first byte to its last, so an `out` that is
    interleaved with an input (two halves of one buffer's last axis, say) is refused too.

    Args:
        out: what the caller gave.
        q: (..., H, D).
        v: (..., Hk, Dv).
        others: further inputs, which `out` must not overlap either: k, the mask.

    Raises:
        InputError: not a tensor; wrong shape, dtype or device; part of autograd; overlapping itself
            or an input.
    """
    if not isinstance(out, Tensor):
        raise InputError(
            f"out must be a tensor; got {type(out).__name__}. Leave it out for a new one"
        )
    shape = (*q.shape[:-1], v.shape[-1])
    if out.shape != shape:
        raise InputError(
            f"out must have shape {shape}; got {tuple(out.shape)}. Make it by q.new_empty({shape})"
        )
    dtype = out_dtype(q)
    if out.dtype != dtype:
        raise InputError(
            f"out must have dtype {dtype} for {q.dtype} inputs; got {out.dtype}. Make it of "
            "that, or cast the inputs"
        )
    if out.device != q.device:
        raise InputError(f"out must be on {q.device}; got {out.device}. Make it there")

    inputs = [q, v, *(x for x in others if x is not None)]
    if out.requires_grad or needs_grad(*inputs):
        raise InputError("out cannot take part in autograd; call under torch.no_grad()")
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise InputError("out was made in inference mode; write into it there, or clone it")
    if torch.compiler.is_compiling() or out.device.type == "meta":  # no addresses to compare
        return
    if _overlaps_itself(out):
        raise InputError(
            f"out must not overlap itself; got strides {out.stride()} for {shape}. Give a tensor "
            "that was not expanded"
        )
    for x in inputs:
        if _overlap(out, x):
            raise InputError(
                f"out must not overlap the memory of an input; got it over one of shape "
                f"{tuple(x.shape)}. Give memory of its own"
            )


def out_dtype(q: Tensor) -> torch.dtype:
    """The dtype of attention's result: that of q, but bfloat16 for float8."""
    return torch.bfloat16 if q.dtype.itemsize == 1 else q.dtype


def needs_grad(*tensors: Tensor) -> bool:
    """Whether autograd records what is done to these tensors."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x.requires_grad:
                return True
    return False


def has_tangent(*tensors: Tensor) -> bool:
    """Whether a tensor has a forward-mode derivative, at the level that is open."""
    if forward_ad._current_level < 0:
        return False
    unpack: Callable[[Tensor], Any] = forward_ad.unpack_dual
    return any(unpack(x).tangent is not None for x in tensors)


def in_functional() -> bool:
    """Whether forward-mode derivatives or a transform of torch.func may be under way."""
    return forward_ad._current_level >= 0 or _transforms() is not None


_transforms = torch._C._functorch.peek_interpreter_stack


def is_functional(*tensors: Tensor) -> bool:
    """Whether a tensor has a forward-mode derivative, or is in a transform of torch.func."""
    if _transforms() is not None:
        return any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors))
    return has_tangent(*tensors)


def name_of(kernel: Any) -> str:
    """What to call a callable in a message."""
    if isinstance(kernel, functools.partial):
        return name_of(kernel.func)
    return str(getattr(kernel, "__name__", None) or repr(kernel))


def _lse_request(kernel: Callable[..., Any], signature: Signature) -> dict[str, bool]:
    switch = signature.lse_switch
    if switch is not None:
        return {switch: True}
    if signature.members == 1:
        raise KernelUnavailableError(
            f"{name_of(kernel)} cannot return a log-sum-exp; call without `return_lse`, or take "
            "another kernel"
        )
    return {}


def _check_call(
    kernel: Callable[..., Any],
    signature: Signature,
    out: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    if "out" in signature.bound:
        raise InputError(f"{name_of(kernel)} has an `out` bound already; unbind it to give another")
    given = dict(zip(signature.positional, args, strict=False))
    if given.get("out") is not None:
        raise InputError(
            f"{name_of(kernel)} takes `out` by position, and something was passed there already; "
            "pass q, k and v by name"
        )
    q = args[0] if args else _named(_Q_NAMES, kwargs)
    v = args[2] if len(args) > 2 else _named(_V_NAMES, kwargs)
    if not (isinstance(q, Tensor) and isinstance(v, Tensor)):
        got = ", ".join([*(type(x).__name__ for x in args), *kwargs]) or "nothing"
        raise InputError(
            f"with `out`, q, k and v must come first, or by name: q, k, v; got {got}. Take "
            "packed tensors (qkv, kv) apart first"
        )
    others = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    check_out(out, q, v, others=[x for x in others if x is not q and x is not v])


def _named(names: tuple[str, ...], kwargs: dict[str, Any]) -> Any:
    return next((kwargs[name] for name in names if name in kwargs), None)


def _span(x: Tensor) -> tuple[int, int]:
    """The addresses of the first byte and of the one after the last; 0 where there is none."""
    start, size = x.data_ptr(), x.nbytes
    if not x.is_contiguous():
        steps = zip(x.shape, x.stride(), strict=True)
        last = sum((length - 1) * stride for length, stride in steps)
        size = (last + 1) * x.element_size()
    return start, start + size


def _overlap(x: Tensor, y: Tensor) -> bool:
    if x.device != y.device:
        return False
    (x_start, x_end), (y_start, y_end) = _span(x), _span(y)
    return x_start < y_end and y_start < x_end


def _overlaps_itself(x: Tensor) -> bool:
    """Whether two elements may share memory: each stride must clear all that lies within it."""
    if x.is_contiguous():
        return False
    reach = 0
    for stride, length in sorted(zip(x.stride(), x.shape, strict=True)):
        if length > 1:
            if stride <= reach:
                return True
            reach += (length - 1) * stride
    return False
