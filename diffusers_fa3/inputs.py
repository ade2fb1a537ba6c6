"""What must hold of q, k, v and the mask before anything runs; all of it is checked here."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.torch_version import TorchVersion

from diffusers_fa3.errors import InputError, MaskError
from diffusers_fa3.masks import PackingPlan

READS_IN_TRANSFORMS = TorchVersion(torch.__version__) >= "2.13"
"""Whether `tolist` takes a tensor that was made in a transform of torch.func. It raises on torch
2.9; the releases between were not tried."""


def under_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in the dtypes in which PyTorch's attention would take them.

    Under `torch.autocast` of the device, that is autocast's dtype, except for float64. There,
    QK norms leave q and k in float32 beside v in bfloat16. Elsewhere the tensors stay as they are.
    """
    return _autocast(q), _autocast(k), _autocast(v)


def _autocast(x: Tensor) -> Tensor:
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):
        return x
    eligible = x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if eligible else x


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | PackingPlan | None, causal: bool
) -> tuple[int, int, int, int]:
    """(B, H, Sq, Sk); raises where no attention could be meant by these arguments.

    Raises:
        InputError: q, k and v do not belong together.
        MaskError: the mask belongs to another call, or lies on another device.
    """
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if not len(q_shape) == len(k_shape) == len(v_shape) == 4:
        raise _bad("q, k and v have 4 axes (B, S, H, D)", q, k, v)
    batch, q_len, heads, head_dim = q_shape
    k_batch, k_len, k_heads, k_head_dim = k_shape
    v_batch, v_len, v_heads, _ = v_shape
    if not batch == k_batch == v_batch:
        raise _bad("q, k and v are of one batch size", q, k, v)
    if k_len != v_len or k_heads != v_heads:
        raise _bad("k and v are of one length and number of heads", q, k, v)
    if head_dim != k_head_dim:
        raise _bad("q and k are of one head size", q, k, v)
    if k_heads == 0 or heads % k_heads:
        raise _bad("q's number of heads is a multiple of k's", q, k, v)
    if not q.dtype == k.dtype == v.dtype:
        raise InputError(
            f"q, k and v are of one dtype; got {q.dtype}, {k.dtype}, {v.dtype}. Cast them to one, "
            "or call under torch.autocast"
        )
    if not q.device == k.device == v.device:
        raise InputError(
            f"q, k and v lie on one device; got {q.device}, {k.device}, {v.device}. Move them "
            "to one"
        )
    if causal and (mask is not None or q_len != k_len):
        raise InputError(
            "causal needs as many queries as keys, and no mask: kernels align it at the end of the "
            f"keys, PyTorch at their beginning; got q_len {q_len}, k_len {k_len}, "
            f"{'no mask' if mask is None else 'a mask'}. Pass it as a mask"
        )
    if mask is not None:
        _check_mask(mask, q, k)
    return batch, heads, q_len, k_len


def why_unreadable(mask: Tensor) -> str:
    """Why a mask has no content that could be read; empty if it has, and in a graph."""
    if mask.is_meta:
        return "mask on the meta device, where it has no content"
    if torch.compiler.is_compiling():
        return ""
    if isinstance(mask, FakeTensor):
        return "mask that is a FakeTensor, which has no content"
    if not READS_IN_TRANSFORMS and torch._C._functorch.peek_interpreter_stack() is not None:
        return "mask in a transform of torch.func, where this torch cannot read it"
    while torch._C._functorch.is_functorch_wrapped_tensor(mask):
        if torch._C._functorch.is_batchedtensor(mask):
            return "mask that torch.func.vmap maps, where it is many masks"
        mask = torch._C._functorch.get_unwrapped(mask)
    return ""


def _check_mask(mask: Tensor | PackingPlan, q: Tensor, k: Tensor) -> None:
    if isinstance(mask, Tensor):
        if mask.device != q.device:
            raise MaskError(
                f"the mask lies where q does; got {mask.device} and {q.device}. Move the mask"
            )
        return
    if not isinstance(mask, PackingPlan):
        raise InputError(
            f"mask is a tensor, a plan of plan_packing, or None; got {type(mask).__name__}. Make a "
            "tensor of it: torch.tensor(mask, device=q.device)"
        )
    planned = (mask.batch, mask.q_len, mask.k_len)
    if planned != (q.shape[0], q.shape[1], k.shape[1]):
        raise MaskError(
            f"the plan is for (B, Sq, Sk) = {planned}; got q {tuple(q.shape)}, k {tuple(k.shape)}. "
            "Make a plan of these sizes, by plan_packing"
        )


def _bad(rule: str, q: Tensor, k: Tensor, v: Tensor) -> InputError:
    return InputError(
        f"{rule}; got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}. Give q "
        "(B, Sq, H, D), k (B, Sk, Hk, D) and v (B, Sk, Hk, Dv), where Hk divides H"
    )
