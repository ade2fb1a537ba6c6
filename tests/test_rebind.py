"""A switched processor runs the functions of its module as they are, but for attention calls."""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models import attention_dispatch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from releases import needs
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import CASES

from diffusers_fa3 import (
    FA3AttnProcessor,
    FallbackWarning,
    UnsupportedModelError,
    coverage,
    disable_fa3,
    enable_fa3,
)
from diffusers_fa3.layers.names import loads, renamed

BY_NAME = {case.name: case for case in CASES}
UNREACHED = "makes no attention call that could be switched"


def layer(processor: object) -> Attention:
    torch.manual_seed(0)
    return Attention(query_dim=8, heads=2, dim_head=4, processor=processor).eval()


def states() -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def unet(processor: Callable[[], object]) -> UNet2DConditionModel:
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    model.set_attn_processor({name: processor() for name in model.attn_processors})
    return model


UNET_INPUTS = (torch.randn(1, 4, 8, 8), 1, torch.randn(1, 3, 8))


def script(source: str) -> types.ModuleType:
    """A module as a script or a notebook is: code that ran, and may run again."""
    module = types.ModuleType("a_script")
    module.__dict__.update(torch=torch, nn=nn, F=F, attention_dispatch=attention_dispatch)
    exec(source, vars(module))
    return module


def heads(attn: Attention, x: Tensor) -> list[Tensor]:
    tokens = (attn.to_q(x), attn.to_k(x), attn.to_v(x))
    return [t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in tokens]


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


# --- the module's own globals ------------------------------------------------------------------

STEERED = """
calls, strength = 0, 1.0

class Processor:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        global calls
        calls += 1
        q, k, v = (to(hidden_states)[:, None] for to in (attn.to_q, attn.to_k, attn.to_v))
        return strength * later(F.scaled_dot_product_attention(q, k, v)[:, 0])

class Second(Processor):
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return 2 * super().__call__(attn, hidden_states)

def later(x):
    return x
"""


@pytest.mark.parametrize("name", ["Processor", "Second"])
def test_globals_of_a_script_are_read_and_written_where_they_are(name: str) -> None:
    module = script(STEERED)
    attn = layer(getattr(module, name)())
    expected = attn(states())
    attn.set_processor(FA3AttnProcessor(attn.processor, kernel="reference"))
    torch.testing.assert_close(attn(states()), expected)
    assert module.calls == 2
    module.strength = 0.5
    torch.testing.assert_close(attn(states()), expected / 2)
    module.later = torch.zeros_like
    assert attn(states()).abs().max() == 0
    assert module.calls == 4
    assert coverage(attn).calls == 3


def test_two_classes_of_one_script_share_its_globals() -> None:
    module = script(STEERED)
    first, second = layer(module.Processor()), layer(module.Second())
    enable_fa3(first, kernel="reference")
    enable_fa3(second, kernel="reference")
    torch.testing.assert_close(second(states()), 2 * first(states()))
    assert module.calls == 2
    module.strength = 3.0
    disable_fa3(first)
    torch.testing.assert_close(second(states()), 2 * first(states()))


def test_nothing_that_was_in_a_module_is_another_thing_afterwards() -> None:
    module = script(STEERED)
    places = (vars(module), vars(F), vars(attention_dispatch), vars(sys.modules[__name__]))
    before = [dict(place) for place in places]
    attn = layer(module.Processor())
    enable_fa3(attn, kernel="reference")
    for place, was in zip(places, before):
        assert {name: place[name] for name in was} == was
        assert all(name.startswith("_fa3_") for name in place.keys() - was.keys())


HELPED = """
def inner(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)

def attend(q, k, v, depth=1):
    return inner(q, k, v) if depth == 0 else attend(q, k, v, depth - 1)

class Processor:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        q, k, v = (to(hidden_states)[:, None] for to in (attn.to_q, attn.to_k, attn.to_v))
        return attend(q, k, v)[:, 0]
"""


@pytest.mark.parametrize(
    ("again", "factor", "reached"),
    [
        ("def attend(q, k, v): return 3 * F.scaled_dot_product_attention(q, k, v)", 3, True),
        ("def inner(q, k, v): return 4 * F.scaled_dot_product_attention(q, k, v)", 4, True),
        (
            "def new(q, k, v): return 5 * F.scaled_dot_product_attention(q, k, v)\n"
            "def attend(q, k, v): return new(q, k, v)",
            5,
            True,
        ),
        ("def attend(q, k, v): return 0 * v", 0, False),
    ],
    ids=["helper", "helper of a helper", "through a new helper", "no attention any more"],
)
def test_a_helper_that_is_defined_again_is_followed(
    again: str, factor: float, reached: bool
) -> None:
    module = script(HELPED)
    attn = layer(module.Processor())
    expected = attn(states())
    enable_fa3(attn, kernel="reference", fallback="silent")
    torch.testing.assert_close(attn(states()), expected)
    assert coverage(attn).calls == 1
    exec(again, vars(module))
    torch.testing.assert_close(attn(states()), factor * expected)
    assert coverage(attn).calls == 1 + reached
    assert coverage(attn).rows[0].skipped == (not reached)
    exec("def attend(q, k, v): return 7 * F.scaled_dot_product_attention(q, k, v)", vars(module))
    torch.testing.assert_close(attn(states()), 7 * expected)
    assert coverage(attn).calls == 2 + reached


# --- however attention is spelled --------------------------------------------------------------

SPELLINGS = {
    "F": "F.scaled_dot_product_attention(q, k, v)",
    "nn.functional": "nn.functional.scaled_dot_product_attention(q, k, v)",
    "torch.nn.functional": "torch.nn.functional.scaled_dot_product_attention(q, k, v)",
    "imported": "scaled_dot_product_attention(q, k, v)",
    "imported by another name": "sdpa(q, k, v)",
    "kept in a local": "(lambda f: f(q, k, v))(F.scaled_dot_product_attention)",
    "in a generator": "next(F.scaled_dot_product_attention(q, k, v) for _ in range(1))",
    "in a nested function": "(lambda: F.scaled_dot_product_attention(q, k, v))()",
    "also an attribute": "self.scaled_dot_product_attention(sdpa(q, k, v), sdpa)",
    "also another's attribute": (
        "self.scaled_dot_product_attention(F.scaled_dot_product_attention(q, k, v), None)"
    ),
    "dispatcher": "dispatch_attention_fn(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)",
    "dispatcher of its module": (
        "attention_dispatch.dispatch_attention_fn("
        "*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)"
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_attention_is_reached_however_it_is_spelled(spelling: str) -> None:
    module = script(
        f"""
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa
from diffusers.models.attention_dispatch import dispatch_attention_fn

class Processor:
    def scaled_dot_product_attention(self, x, sdpa):
        return x

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        q, k, v = (to(hidden_states)[:, None] for to in (attn.to_q, attn.to_k, attn.to_v))
        return {SPELLINGS[spelling]}[:, 0]
"""
    )
    attn = layer(module.Processor())
    expected = attn(states())
    enable_fa3(attn, kernel="reference", fallback="error")
    torch.testing.assert_close(attn(states()), expected)
    assert coverage(attn).calls == 1


def test_a_function_that_somebody_put_in_the_place_of_pytorchs_is_found_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, *_, **__: 0 * v)
    module = script(HELPED)
    attn = layer(module.Processor())
    enable_fa3(attn, kernel="reference", fallback="error")
    attn(states())
    assert coverage(attn).calls == 1
    disable_fa3(attn)
    assert attn(states()).abs().max() == 0


# --- processors that are modules ---------------------------------------------------------------


class WithForward(nn.Module):
    """A module like any other: it has a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any
    ) -> Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = heads(attn, hidden_states)[0]
        k, v = (
            to(text).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for to in (attn.to_k, attn.to_v)
        )
        return attn.to_out[0](joined(self.scale * F.scaled_dot_product_attention(q, k, v)))


class WithForwardOfItsBase(WithForward):
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}once"

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(*args, **kwargs)


MODULES = [WithForward, WithForwardOfItsBase]


@pytest.mark.parametrize("processor", MODULES)
def test_a_processor_with_a_forward_runs_and_stays_a_module(processor: type[nn.Module]) -> None:
    model = unet(processor)
    ran = []
    for own in model.attn_processors.values():
        own.register_forward_hook(lambda *_: ran.append("hook"))
    default, names = model(*UNET_INPUTS).sample, list(model.state_dict())
    hooks = len(ran)
    assert hooks
    enable_fa3(model, kernel="reference", fallback="error")
    torch.testing.assert_close(model(*UNET_INPUTS).sample, default)
    assert len(ran) == 2 * hooks
    assert list(model.state_dict()) == names
    assert coverage(model).calls == hooks
    wrapped = next(iter(model.attn_processors.values()))
    assert isinstance(wrapped, nn.Module)
    assert wrapped.extra_repr() == ("once" if processor is WithForwardOfItsBase else "")
    model(*UNET_INPUTS).sample.sum().backward()
    assert wrapped.scale.grad is not None


class InMethods(AttnProcessor2_0):
    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        attend = self.attend
        q, k, v = heads(attn, hidden_states)
        return joined(attend(q, k, v) + self.attend(k, q, v))

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class InAPlainMethod(AttnProcessor2_0):
    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        attend = self.attend
        return joined(attend(*heads(attn, hidden_states)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("processor", [*MODULES, InMethods, InAPlainMethod])
def test_a_processor_compiles_whose_attention_is_in_a_method(processor: type) -> None:
    torch._dynamo.reset()  # all of them compile one forward of diffusers
    attn = layer(processor())
    expected = attn(states())
    enable_fa3(attn, kernel="reference", fallback="error")
    compiled = torch.compile(attn, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(states()), expected)
    assert coverage(attn).calls == 1 + (processor is InMethods)


# --- one code object, one set of globals -------------------------------------------------------


def with_graph_breaks(name: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A model whose processors are compiled as frames of their own, as by hooks of offloading."""
    case = BY_NAME[name]
    model = case.build()
    for module in model.modules():
        if hasattr(module, "processor"):
            module.to_k.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    model.compile(backend="eager")
    return model, lambda model: case.run(model, "none")


# diffusers 0.36 calls a cached function in its dispatcher
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a:UserWarning")
@pytest.mark.parametrize(
    "name", ["flux", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd3", "unet_sd15"))]
)
@pytest.mark.parametrize("first", ["switched", "other"])
def test_a_switched_model_and_another_are_compiled_in_any_order(name: str, first: str) -> None:
    torch._dynamo.reset()
    (switched, run), (other, _) = with_graph_breaks(name), with_graph_breaks(name)
    enable_fa3(switched, kernel="reference", fallback="error")
    models = {"switched": switched, "other": other}
    order = [first, *(models.keys() - {first})]
    results = [run(models[which]) for which in (*order, *order)]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
    assert coverage(switched).calls
    before = coverage(switched).calls
    disable_fa3(switched)
    torch.testing.assert_close(run(switched), results[0])
    assert coverage(switched).calls == 0 < before


# --- what counts is what happened --------------------------------------------------------------


class DecoratedOverBase(AttnProcessor2_0):
    @torch.no_grad()
    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().__call__(attn, hidden_states, *args, **kwargs)


class DecoratedWithItsOwn(AttnProcessor2_0):
    @torch.no_grad()
    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = heads(attn, hidden_states)
        return attn.to_out[0](joined(F.scaled_dot_product_attention(q, k, v)))


elsewhere = types.ModuleType("a_package")
exec(
    "from torch.nn import functional as F\n"
    "def attend(q, k, v): return F.scaled_dot_product_attention(q, k, v)",
    vars(elsewhere),
)


class OfAnotherPackage(AttnProcessor2_0):
    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return attn.to_out[0](joined(elsewhere.attend(*heads(attn, hidden_states))))


def test_a_decorated_processor_over_a_base_of_diffusers_is_on_the_kernel() -> None:
    model = unet(DecoratedOverBase)
    default = model(*UNET_INPUTS).sample
    enable_fa3(model, kernel="reference", fallback="error")
    torch.testing.assert_close(model(*UNET_INPUTS).sample, default)
    assert coverage(model).calls == len(model.attn_processors)


@pytest.mark.parametrize("processor", [DecoratedWithItsOwn, OfAnotherPackage])
def test_a_processor_whose_attention_is_out_of_reach_is_counted_and_told(processor: type) -> None:
    attn = layer(processor())
    expected = attn(states())
    enable_fa3(attn, kernel="reference")
    with pytest.warns(FallbackWarning, match=UNREACHED):
        torch.testing.assert_close(attn(states()), expected)
    report = coverage(attn)
    assert (report.calls, report.fallbacks) == (0, 1)
    enable_fa3(attn, kernel="reference", fallback="error")
    with pytest.raises(UnsupportedModelError, match=UNREACHED):
        attn(states())


def test_a_processor_told_to_leave_attention_out_is_not_called_unreached() -> None:
    needs("0.37", "has no perturbed attention in LTX 2")
    case = BY_NAME["ltx2_perturbed_throughout"]
    model = case.build()
    enable_fa3(model, kernel="reference", fallback="error")
    case.run(model, "none")
    assert coverage(model).fallbacks == 0


class Base(AttnProcessor2_0):
    def joined(self, x: Tensor) -> Tensor:
        return joined(F.scaled_dot_product_attention(x, x, x))


class Override(Base):
    def joined(self, x: Tensor) -> Tensor:
        return 0 * joined(x)

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.joined(heads(attn, hidden_states)[0])


def test_an_override_without_attention_stays_one() -> None:
    attn = layer(Override())
    enable_fa3(attn, kernel="reference", fallback="silent")
    assert attn(states()).abs().max() == 0
    assert coverage(attn).fallbacks == 1


# --- names in code -----------------------------------------------------------------------------


def function_with(names: int, body: str) -> types.FunctionType:
    """A function that uses so many names, in this order, before it comes to its body."""
    lines = [f"    n{i}" for i in range(names)]
    namespace: dict[str, Any] = {f"n{i}": i for i in range(names)}
    namespace |= {"F": F, "thing": types.SimpleNamespace(scaled_dot_product_attention=1)}
    exec("\n".join(["def f():", *lines, f"    return {body}"]), namespace)
    return namespace["f"]


def on_ours(function: types.FunctionType) -> types.FunctionType:
    """The function with PyTorch's attention by the name of another function of the module."""

    def new_name(load: Any) -> str | None:
        return "gelu" if load.value is F.scaled_dot_product_attention else None

    code = renamed(function.__code__, function.__globals__, new_name)
    return types.FunctionType(code, function.__globals__)


BODIES = {
    "alone": "F.scaled_dot_product_attention",
    "shared": "(thing.scaled_dot_product_attention, F.scaled_dot_product_attention)[1]",
    "shared, later": "(F.scaled_dot_product_attention, thing.scaled_dot_product_attention)[0]",
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("names", [0, 1, 100, 200, 260, 400])
def test_only_the_load_that_is_meant_goes_by_another_name(names: int, body: str) -> None:
    function = function_with(names, BODIES[body])
    assert function() is F.scaled_dot_product_attention
    assert on_ours(function)() is F.gelu
    assert on_ours(function).__code__ is not function.__code__
    assert function() is F.scaled_dot_product_attention


def test_a_name_that_is_out_of_an_instructions_reach_is_refused() -> None:
    refused = 0
    for names in (*range(118, 134), *range(246, 262)):  # an instruction has a byte for it, or more
        function = function_with(names, BODIES["shared"])
        try:
            result = on_ours(function)()
        except UnsupportedModelError:
            refused += 1
            with pytest.raises(UnsupportedModelError, match="for attention and for something else"):
                on_ours(function)
        else:
            assert result is F.gelu
    assert 0 < refused < 4


def test_loads_follow_modules_and_nothing_else() -> None:
    function = function_with(1, "(n0, F.gelu, thing.scaled_dot_product_attention, missing)")
    found = [(load.name, load.value) for load in loads(function.__code__, function.__globals__)]
    expected = [("n0", 0), ("n0", 0), ("F", F), ("gelu", F.gelu), ("thing", ...), ("missing", None)]
    for got, want in itertools.zip_longest(found, expected):
        assert got[0] == want[0]
        assert want[1] is ... or got[1] is want[1]
