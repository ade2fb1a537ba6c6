"""Masks kept as two factors, queries and keys, instead of being laid out as (B, 1, S, S).

In every layer, a few of diffusers' blocks expand a (B, S) padding mask to (B, 1, S, S): 2.5 GB at
50,000 tokens, written several times. Given a `SpreadMask`, the same operations of the block produce
an `OuterMask`, and the plan is made from its factors, without S x S. All other operations on a
`SpreadMask` or an `OuterMask`, the default attention included, see the ordinary mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from diffusers_fa3.errors import MaskError


class OuterMask(Tensor):
    """A (B, 1, Sq, Sk) mask, `queries * keys`; any operation on it lays it out first.

    Attributes:
        whole: the laid-out mask, kept from the first in-place edit or view on; None before.
    """

    whole: Tensor | None
    _factors: tuple[Tensor, Tensor]
    _versions: list[int]

    @staticmethod
    def __new__(cls, queries: Tensor, keys: Tensor) -> OuterMask:  # noqa: D102
        shape = (max(len(queries), len(keys)), 1, queries.shape[2], keys.shape[3])
        mask: OuterMask = Tensor._make_wrapper_subclass(
            cls, shape, dtype=keys.dtype, device=keys.device
        )
        mask._factors, mask.whole = (queries, keys), None
        mask._versions = mask._versions_now()
        return mask

    def __init__(self, queries: Tensor, keys: Tensor) -> None:
        pass  # __new__ does all of it

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch types it as a method

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it as no method of a class
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and isinstance(given, cls):
                given.whole = given.laid_out()
        args, kwargs = pytree.tree_map_only(cls, cls.laid_out, (args, kwargs))
        return func(*args, **kwargs)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Queries (B or 1, 1, Sq, 1) and keys (B or 1, 1, 1, Sk), both bool or both float.

        Raises:
            MaskError: a factor was edited in place after the multiplication. An ordinary product
                would not show that edit; this one would.
        """
        if self._versions != self._versions_now():
            raise MaskError("a mask was edited in place after it was multiplied; edit a copy of it")
        return self._factors

    def laid_out(self) -> Tensor:
        """The mask as an ordinary (B, 1, Sq, Sk) tensor."""
        if self.whole is not None:
            return self.whole
        queries, keys = self.factors
        return queries * keys

    def _versions_now(self) -> list[int]:
        return [0 if factor.is_inference() else factor._version for factor in self._factors]


class SpreadMask(Tensor):
    """A bool or float mask that is expanded without a copy.

    `repeat` gives a view; the product of two `SpreadMask` is an `OuterMask` where the layout of
    both allows it.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _PRODUCTS and all(isinstance(factor, cls) for factor in args):
                return _product(func, *args)
            result = func(*args, **kwargs) if kwargs else _BY_VIEW.get(func, func)(*args)
            if func in _PARTS:
                return tuple(part.as_subclass(cls) for part in result)
        stays = func in _STAYS and can_be_spread(result)
        return result.as_subclass(cls) if stays else result


_PRODUCTS = frozenset({Tensor.__and__, Tensor.mul, Tensor.__mul__, Tensor.bitwise_and})
_PARTS = frozenset({Tensor.chunk, Tensor.tensor_split, torch.chunk, torch.tensor_split})
"""Operations that split a mask, as context parallelism does; the parts stay `SpreadMask`."""
_STAYS = frozenset(
    {
        F.pad,
        Tensor.__getitem__,
        Tensor.bool,
        Tensor.repeat,
        Tensor.to,
        Tensor.transpose,
        Tensor.unsqueeze,
        Tensor.view,
    }
)
"""Operations whose result stays a `SpreadMask`; any other operation gives a plain tensor."""


def _repeat(mask: Tensor, *times: int) -> Tensor:
    if len(times) == mask.ndim and all(1 in pair for pair in zip(times, mask.shape)):
        return mask.expand(*(n * size for n, size in zip(times, mask.shape)))
    return mask.repeat(*times)


def _view(mask: Tensor, *shape: Any) -> Tensor:
    """`view` for an expanded mask: `reshape` where `view` would only work on a repeated copy."""
    return mask.view(*shape) if isinstance(shape[0], torch.dtype) else mask.reshape(*shape)


_BY_VIEW: dict[Any, Callable[..., Tensor]] = {Tensor.repeat: _repeat, Tensor.view: _view}


def _product(multiply: Callable[..., Tensor], one: Tensor, two: Tensor) -> Tensor:
    one, two = one.as_subclass(Tensor), two.as_subclass(Tensor)
    if one.dtype == two.dtype and one.ndim == two.ndim == 4 and one.shape[:2] == two.shape[:2]:
        queries, keys = (one, two) if _is_spread(one, 3) and _is_spread(two, 2) else (two, one)
        rows, columns = queries.shape[2], keys.shape[3]
        whole = keys.shape[2] in (1, rows) and queries.shape[3] in (1, columns)
        if whole and one.shape[1] == 1 and _is_spread(queries, 3) and _is_spread(keys, 2):
            return OuterMask(queries[..., :1], keys[:, :, :1])
    return multiply(one, two)


def _is_spread(mask: Tensor, axis: int) -> bool:
    """Whether a mask is constant along an axis by its layout: size 1 or stride 0."""
    return mask.shape[axis] == 1 or (mask.shape[axis] > 1 and mask.stride(axis) == 0)


def can_be_spread(mask: Tensor) -> bool:
    """Whether a mask has a dtype that `SpreadMask` supports: bool or float."""
    return mask.dtype == torch.bool or mask.is_floating_point()


def sources_of(mask: Tensor) -> tuple[Tensor, ...]:
    """The tensors that hold a mask's values: both factors of an `OuterMask`, else the mask."""
    return mask.factors if is_in_factors(mask) else (mask,)


def is_in_factors(mask: Tensor) -> TypeGuard[OuterMask]:
    """Whether a mask is an `OuterMask` that still is its factors (`whole` is None)."""
    return isinstance(mask, OuterMask) and mask.whole is None
