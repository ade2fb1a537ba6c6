"""Masks that are not laid out: what is valid stays two factors, queries and keys.

A few of diffusers' blocks make a (B, 1, S, S) mask of a (B, S) one, in every layer, only to say
which tokens are padding: at 50,000 tokens that is 2.5 GB, written several times. Given a
`SpreadMask`, they make an `OuterMask` by the very same operations, of which a plan is made without
looking at S x S. Whatever else is done with either, the default attention included, has the mask
that it would have had.
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
    """A (B, 1, Sq, Sk) mask, `queries * keys`; laid out as soon as any operation asks for it.

    Attributes:
        whole: the mask laid out for good, where it was edited or a view of it was taken.
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
        pass  # all is done where the tensor is made

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
        """Queries (B or 1, 1, Sq, 1), bool or float, and keys (B or 1, 1, 1, Sk), likewise.

        Raises:
            MaskError: one was edited since, of which the product would have known nothing.
        """
        if self._versions != self._versions_now():
            raise MaskError("a mask was edited in place after it was multiplied; edit a copy of it")
        return self._factors

    def laid_out(self) -> Tensor:
        """The mask itself."""
        if self.whole is not None:
            return self.whole
        queries, keys = self.factors
        return queries * keys

    def _versions_now(self) -> list[int]:
        return [0 if factor.is_inference() else factor._version for factor in self._factors]


class SpreadMask(Tensor):
    """A mask, bool or float: repeated it is a view, multiplied by another one an `OuterMask`."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _PRODUCTS and all(isinstance(factor, cls) for factor in args):
                return _product(func, *args)
            result = func(*args, **kwargs) if kwargs else _BY_VIEW.get(func, func)(*args)
        stays = func in _STAYS and can_be_spread(result)
        return result.as_subclass(cls) if stays else result


_PRODUCTS = frozenset({Tensor.__and__, Tensor.mul, Tensor.__mul__, Tensor.bitwise_and})
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
"""Operations after which a mask is still one that is spread out; any other gives a plain tensor."""


def _repeat(mask: Tensor, *times: int) -> Tensor:
    if len(times) == mask.ndim and all(1 in pair for pair in zip(times, mask.shape)):
        return mask.expand(*(n * size for n, size in zip(times, mask.shape)))
    return mask.repeat(*times)


def _view(mask: Tensor, *shape: Any) -> Tensor:
    """Any view that the copy would have allowed for which a repeated mask stands."""
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
    """Whether a mask says the same all along an axis, as its layout tells."""
    return mask.shape[axis] == 1 or (mask.shape[axis] > 1 and mask.stride(axis) == 0)


def can_be_spread(mask: Tensor) -> bool:
    """Whether a mask is of a dtype that `SpreadMask` knows."""
    return mask.dtype == torch.bool or mask.is_floating_point()


def sources_of(mask: Tensor) -> tuple[Tensor, ...]:
    """The tensors that a mask consists of."""
    return mask.factors if is_in_factors(mask) else (mask,)


def is_in_factors(mask: Tensor) -> TypeGuard[OuterMask]:
    """Whether a mask need not be laid out to be read."""
    return isinstance(mask, OuterMask) and mask.whole is None
