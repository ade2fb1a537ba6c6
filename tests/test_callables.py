"""A layer whose processor cannot be wrapped stays as it is and is told; the others are switched."""

from __future__ import annotations

import copy
import enum
import functools
import json
import pickle
import re
import weakref
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn

from diffusers_fa3 import (
    FA3AttnProcessor,
    FallbackWarning,
    UnsupportedModelError,
    coverage,
    disable_fa3,
    enable_fa3,
)

OWN = AttnProcessor2_0()


def function(
    attn: Attention,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    return OWN(attn, hidden_states, encoder_hidden_states, attention_mask)


def run(self: object, *args: object, **kwargs: object) -> torch.Tensor:
    """A `__call__` in Python."""
    return function(*args, **kwargs)


class Metaclass(type):
    """Does not make subclasses as `type` does."""

    def __new__(mcs, name: str, bases: tuple[type, ...], members: dict, *, key: int) -> type:
        return super().__new__(mcs, name, bases, members)

    def __init__(cls, *args: object, key: int) -> None:
        super().__init__(*args)


class Final:
    __call__ = run

    def __init_subclass__(cls) -> None:
        raise RuntimeError("this class is final")


class HandsOn:
    __call__ = run

    def __getattribute__(self, name: str) -> object:
        return getattr(OWN, name)


class Hides:
    __call__ = run

    @property
    def __dict__(self) -> dict[str, object]:
        raise RuntimeError("no attributes for you")


class Makes:
    """Its instances are results."""

    def __new__(cls, *args: object, **kwargs: object) -> torch.Tensor:
        return function(*args, **kwargs)


def of_class(name: str, bases: tuple[type, ...] = (), **members: object) -> object:
    return type(name, bases, members)()


NO_METHOD: dict[str, object] = {
    "function": function,
    "lambda": lambda *args, **kwargs: function(*args, **kwargs),
    "partial": functools.partial(OWN),
    "method": OWN.__call__,
    "cached": functools.lru_cache(function),
    "compiled": torch.compile(function, backend="eager"),
    "proxy": weakref.proxy(OWN),
    "class": Makes,
    "static": of_class("Static", __call__=staticmethod(function)),
    "classmethod": of_class("OfClass", __call__=classmethod(run)),
    "partialmethod": of_class("Part", __call__=functools.partialmethod(run)),
    "partial in a class": of_class("Held", __call__=functools.partial(function)),
}
NOT_WRAPPED: dict[str, object] = {
    "slots": of_class("Slotted", __slots__=(), __call__=run),
    "state beside __dict__": of_class("Beside", __slots__=("state", "__dict__"), __call__=run),
    "dict": of_class("Dict", (dict,), __call__=run),
    "enum": enum.Enum("Choice", {"ONE": 1}, type=type("Callable", (), {"__call__": run})).ONE,
    "metaclass": Metaclass("Keyed", (), {"__call__": run}, key=1)(),
    "final": Final(),
    "hands on": HandsOn(),
    "hides": Hides(),
}
REASONS = dict.fromkeys(NO_METHOD, "only a callable object whose class has a method `__call__`")
REASONS |= dict.fromkeys(NOT_WRAPPED, r"^\w+ cannot be wrapped: ")
PROCESSORS = NO_METHOD | NOT_WRAPPED

every_processor = pytest.mark.parametrize("name", PROCESSORS)


def layers(*processors: object) -> nn.ModuleList:
    """Attention layers with these processors; AttnProcessor2_0 in place of None."""
    torch.manual_seed(0)
    made = nn.ModuleList(Attention(8, heads=1, dim_head=8).eval() for _ in processors)
    for layer, processor in zip(made, processors):
        if processor is not None:
            layer.set_processor(processor)
    return made


def outputs(of: nn.ModuleList) -> list[torch.Tensor]:
    x = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return [layer(x) for layer in of]


@every_processor
def test_a_layer_that_cannot_be_switched_stays_and_the_others_do_not(name: str) -> None:
    """What diffusers runs, it goes on to run; the layer says why, and claims no calls."""
    processor = PROCESSORS[name]
    model = layers(None, processor)
    default = outputs(model)
    with pytest.warns(FallbackWarning, match="^1: the default attention serves, and is not count"):
        enable_fa3(model, kernel="reference")
    assert model[1].processor is processor
    for output, expected in zip(outputs(model), default, strict=True):
        torch.testing.assert_close(output, expected)

    report = coverage(model)
    switched, left = report.rows
    assert (switched.kernel, switched.calls, switched.unswitchable) == (
        *("reference", {"dense": 1}),
        "",
    )
    assert (left.processor, left.kernel) == (type(processor).__name__, "default")
    assert (left.calls, left.fallbacks, left.replaced) == ({}, {}, False)
    assert re.search(REASONS[name], left.unswitchable)
    assert (report.calls, report.fallbacks) == (1, 0)
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    lines = str(report).splitlines()
    assert lines[2].endswith("default    cannot be switched")
    assert lines[-1] == f"default attention, not counted, in 1 layers: {left.unswitchable}"

    disable_fa3(model)
    assert model[1].processor is processor
    assert {(row.kernel, row.unswitchable) for row in coverage(model).rows} == {("default", "")}


@every_processor
def test_by_hand_it_is_an_error_of_this_package(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=REASONS[name]):
        FA3AttnProcessor(PROCESSORS[name])


@pytest.mark.parametrize(
    "processor",
    [mock.Mock(side_effect=function), torch.compile(nn.Identity(), backend="eager")],
    ids=["mock", "compiled module"],
)
def test_objects_with_a_call_in_python_are_switched(processor: object) -> None:
    """Their attention is not reached, which the call tells."""
    model = layers(processor)
    enable_fa3(model, kernel="reference", fallback="silent")
    assert coverage(model).rows[0].unswitchable == ""
    disable_fa3(model)
    assert model[0].processor is processor


# --- what is told --------------------------------------------------------------------------------


def test_each_reason_is_told_once(recwarn: pytest.WarningsRecorder) -> None:
    model = layers(None, *6 * [function], functools.partial(OWN))
    enable_fa3(model, kernel="reference")
    texts = [str(warning.message) for warning in recwarn if warning.category is FallbackWarning]
    assert [text.partition(":")[0] for text in texts] == ["1, 2, 3 and 3 more", "7"]
    assert [text.rpartition(" ")[2] for text in texts] == ["function", "partial"]
    assert {warning.filename for warning in recwarn} == {__file__}
    outputs(model)
    assert len(recwarn) == 2
    assert "default attention, not counted, in 6 layers: only" in str(coverage(model))


def test_silence_is_silent(recwarn: pytest.WarningsRecorder) -> None:
    model = layers(None, function)
    enable_fa3(model, kernel="reference", fallback="silent")
    assert not recwarn
    assert coverage(model).rows[1].unswitchable


def test_as_an_error_it_leaves_all_as_they_were() -> None:
    model = layers(None, function, function, OWN.__call__)
    with pytest.raises(UnsupportedModelError) as caught:
        enable_fa3(model, kernel="reference", fallback="error")
    text = str(caught.value)
    assert text.startswith("3 of 4 attention layers cannot be switched. 1, 2: only a callable")
    assert "got a function. 3: only a callable" in text
    assert "by `layers`: a regular expression" in text
    assert {row.kernel for row in coverage(model).rows} == {"default"}
    assert not any(row.unswitchable for row in coverage(model).rows)
    enable_fa3(model, kernel="reference", fallback="error", layers="^0$")
    outputs(model)
    assert coverage(model).calls == 1


@pytest.mark.parametrize("fallback", ["warn", "silent"])
def test_where_nothing_can_be_switched_it_is_an_error(fallback: str) -> None:
    model = layers(function, OWN.__call__)
    with pytest.raises(UnsupportedModelError, match=r"^2 of 2 attention .* 0: .* 1: .* `layers`"):
        enable_fa3(model, fallback=fallback)
    with pytest.raises(UnsupportedModelError, match=r"^1 of 1 attention layers"):
        enable_fa3(layers(None, function), layers="1", fallback=fallback)


# --- what happens later --------------------------------------------------------------------------


def test_another_processor_takes_the_reason_away() -> None:
    model = layers(None, function)
    enable_fa3(model, kernel="reference", fallback="silent")
    model[1].set_processor(AttnProcessor2_0())
    row = coverage(model).rows[1]
    assert (row.replaced, row.unswitchable) == (True, "")
    enable_fa3(model, kernel="reference", fallback="error")
    assert not any(row.replaced for row in coverage(model).rows)
    outputs(model)
    assert coverage(model).calls == 2


def test_a_switched_layer_that_is_given_a_function_is_told_at_the_next_switch() -> None:
    model = layers(None, None)
    enable_fa3(model, kernel="reference")
    model[1].set_processor(function)
    row = coverage(model).rows[1]
    assert (row.replaced, row.unswitchable) == (True, "")
    for _ in range(2):
        with pytest.warns(FallbackWarning, match="got a function"):
            enable_fa3(model, kernel="reference")
        row = coverage(model).rows[1]
        assert not row.replaced
        assert "got a function" in row.unswitchable


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_says_the_same(how: Callable[[nn.Module], nn.Module]) -> None:
    model = layers(None, function, functools.partial(OWN), OWN.__call__)
    enable_fa3(model, kernel="reference", fallback="silent")
    rows = coverage(how(model)).rows
    assert [row.unswitchable for row in rows] == [r.unswitchable for r in coverage(model).rows]
    assert not any(row.replaced for row in rows)
    assert list(model.state_dict()) == list(layers(None, None, None, None).state_dict())
