"""Call a kernel's forward with the fields of `Options` and `Lengths` as keywords."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from diffusers_fa3.kernels.contract import Result
from diffusers_fa3.options import DENSE, Lengths, Options


def by_name(forward: Callable[..., Result]) -> Callable[..., Result]:
    """`forward`, taking the fields of `Options` and `Lengths` as keywords beside its own."""

    def call(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Result:
        options = Options(**{name: given.pop(name) for name in Options._fields if name in given})
        lengths = {name: given.pop(name) for name in Lengths._fields if name in given}
        return forward(q, k, v, options, Lengths(**lengths) if lengths else DENSE, **given)

    return call
