"""Where a switched layer lives: its model, which knows whether it is split over ranks."""

from __future__ import annotations

import sys
import weakref
from itertools import count
from types import FrameType
from typing import Any

from diffusers import ModelMixin
from torch import nn

from diffusers_fa3.parallel.plans import UNNAMED, Named, named_by_ours


class Home:
    """The diffusers model that a layer is in, held weakly, and what our plan says of the layer.

    A deep copy of the model takes its homes along; a layer that is copied alone has none.
    """

    __slots__ = ("_model", "name", "named", "number")

    def __init__(self, model: nn.Module, name: str) -> None:
        self._model = weakref.ref(model)
        self.name = name
        self.named = named_by_ours(model, name)
        numbers = _numbers.setdefault(model, {})
        if self.named not in numbers:
            numbers[self.named] = next(_unused)
        self.number = numbers[self.named]
        """One for all layers of a model of which a plan says the same: to torch.compile it is a
        constant, which one object for each layer could not be without a graph for each."""

    @property
    def model(self) -> Any:
        """The model, or None if it is gone."""
        return self._model()

    def is_split(self) -> bool:
        """Whether `enable_parallelism` was called on the model."""
        return getattr(self._model(), "_parallel_config", None) is not None

    def __deepcopy__(self, memo: dict[int, Any]) -> Home | None:
        copied = memo.get(id(self.model))
        return None if copied is None else Home(copied, self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _home, (self.model, self.name)


def _home(model: nn.Module | None, name: str) -> Home | None:
    return None if model is None else Home(model, name)


def home_on_the_stack(layer: Any) -> Home | None:
    """The split model that runs `layer` right now; None if none does.

    For processors that were wrapped by hand, which nobody told where their layers are.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        running = frame.f_locals.get("self")
        running = getattr(running, "_orig_mod", running)  # of a compiled model
        model: Any = running if isinstance(running, ModelMixin) else None
        if getattr(model, "_parallel_config", None) is not None:
            names = (name for name, module in model.named_modules() if module is layer)
            return Home(model, next(names, ""))
        frame = frame.f_back
    return None


def of_number(number: int) -> tuple[Any, Named]:
    """The model and what our plan says of its layers of that number; None if the model is gone."""
    for model, numbers in _numbers.items():
        for named, each in numbers.items():
            if each == number:
                return model, named
    return None, UNNAMED


_unused = count(1)
_numbers: weakref.WeakKeyDictionary[nn.Module, dict[Named, int]] = weakref.WeakKeyDictionary()
