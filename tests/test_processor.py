"""A wrapped processor is the layer's own processor, with its attention calls on the kernel."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
)
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from torch import nn
from torch.nn import functional as F

from diffusers_fa3 import (
    FA3AttnProcessor,
    FallbackWarning,
    KernelUnavailableError,
    UnsupportedModelError,
    coverage,
    enable_fa3,
)
from diffusers_fa3.layers.processor import record_of, unwrap

DIM, HEADS = 32, 4


def layer(processor: object, **options: object) -> Attention:
    torch.manual_seed(0)
    return Attention(DIM, heads=HEADS, dim_head=DIM // HEADS, processor=processor, **options).eval()


def states(seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 6, DIM, generator=torch.Generator().manual_seed(seed))


GAP = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 0, 0, 1, 1, 1]], dtype=torch.bool)
BIAS = torch.rand(2, 6, 6)  # the same for all heads


def routes(attn: Attention) -> dict[str, int]:
    return coverage(attn).rows[0].calls


# --- what stays -------------------------------------------------------------------------------


def test_it_is_of_its_own_class_and_of_ours() -> None:
    own = FluxAttnProcessor()
    wrapped = FA3AttnProcessor(own)
    assert isinstance(wrapped, FluxAttnProcessor)
    assert isinstance(wrapped, FA3AttnProcessor)
    assert wrapped.__class__ is FluxAttnProcessor
    assert wrapped.__class__ in (FluxAttnProcessor, AttnProcessor)
    assert unwrap(wrapped) is own


def test_it_shares_all_attributes_in_both_directions() -> None:
    own = FluxAttnProcessor()
    own.before = 1
    wrapped = FA3AttnProcessor(own)
    assert wrapped.before == 1
    wrapped._attention_backend = "native"
    assert own._attention_backend == "native"
    own.later = 2
    assert wrapped.later == 2


def test_diffusers_still_reads_the_arguments_of_its_call() -> None:
    own = QwenDoubleStreamAttnProcessor2_0()
    wrapped = FA3AttnProcessor(own)
    assert inspect.signature(wrapped.__call__) == inspect.signature(own.__call__)


def test_weights_of_a_processor_stay_its_own() -> None:
    attn = layer(IPAdapterAttnProcessor2_0(DIM, DIM, num_tokens=(4,)), cross_attention_dim=DIM)
    own, before = attn.processor, attn.state_dict()
    enable_fa3(attn, kernel="reference")
    assert list(attn.state_dict()) == list(before)
    attn.to(torch.float64)
    assert own.to_k_ip[0].weight.dtype == torch.float64
    assert next(attn.processor.parameters()) is next(own.parameters())


def test_nothing_else_is_touched() -> None:
    module = inspect.getmodule(FluxAttnProcessor)
    before = (module.dispatch_attention_fn, F.scaled_dot_product_attention)
    own_call = FluxAttnProcessor.__call__
    FA3AttnProcessor(FluxAttnProcessor())
    assert (module.dispatch_attention_fn, F.scaled_dot_product_attention) == before
    assert FluxAttnProcessor.__call__ is own_call
    assert dispatch_attention_fn.__module__ == "diffusers.models.attention_dispatch"


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_is_switched_too_and_independent(how) -> None:
    attn = layer(AttnProcessor2_0())
    enable_fa3(attn, kernel="reference")
    attn(states())
    other = how(attn)
    assert routes(other) == {}
    assert torch.equal(other(states()), attn(states()))
    assert (routes(attn), routes(other)) == ({"dense": 2}, {"dense": 1})
    assert unwrap(other.processor) is not unwrap(attn.processor)
    assert (
        record_of(other.processor).settings.switch_id
        != record_of(attn.processor).settings.switch_id
    )
    assert type(unwrap(other.processor)) is AttnProcessor2_0


def test_wrapping_twice_is_wrapping_once() -> None:
    own = AttnProcessor2_0()
    twice = FA3AttnProcessor(FA3AttnProcessor(own))
    assert unwrap(twice) is own


# --- what a call does ----------------------------------------------------------------------------


def test_the_way_of_the_documentation_on_a_whole_model() -> None:
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    model.set_attn_processor({n: FA3AttnProcessor(p) for n, p in model.attn_processors.items()})
    assert all(isinstance(p, FA3AttnProcessor) for p in model.attn_processors.values())
    assert all(isinstance(p, FluxAttnProcessor) for p in model.attn_processors.values())


def test_a_bias_goes_to_the_default_attention_and_is_counted() -> None:
    attn = layer(AttnProcessor2_0())
    expected = attn(states(), attention_mask=BIAS)
    enable_fa3(attn, kernel="reference")
    with pytest.warns(FallbackWarning, match="AttnProcessor2_0: the default .* bias, not a mask"):
        output = attn(states(), attention_mask=BIAS)
    assert torch.equal(output, expected)
    (row,) = coverage(attn).rows
    assert row.calls == {}
    assert row.fallbacks == {"float32 mask with values that are a bias, not a mask": 1}


def test_a_reason_is_told_once(recwarn: pytest.WarningsRecorder) -> None:
    attn = layer(AttnProcessor2_0())
    enable_fa3(attn, kernel="reference")
    for _ in range(3):
        attn(states(), attention_mask=BIAS)
    assert len([w for w in recwarn if w.category is FallbackWarning]) == 1
    assert coverage(attn).fallbacks == 3


def test_silence_is_silent_and_counted(recwarn: pytest.WarningsRecorder) -> None:
    attn = layer(AttnProcessor2_0())
    enable_fa3(attn, kernel="reference", fallback="silent")
    attn(states(), attention_mask=BIAS)
    assert not [w for w in recwarn if w.category is FallbackWarning]
    assert coverage(attn).fallbacks == 1


def test_a_fallback_can_be_an_error_and_the_layer_works_afterwards() -> None:
    attn = layer(AttnProcessor2_0())
    enable_fa3(attn, kernel="reference", fallback="error")
    with pytest.raises(ValueError, match="a bias, not a mask"):
        attn(states(), attention_mask=BIAS)
    attn(states())
    assert routes(attn) == {"dense": 1}


def test_a_call_that_only_the_default_attention_takes_gives_its_error() -> None:
    attn = layer(AttnProcessor2_0())
    enable_fa3(attn, kernel="reference", fallback="silent")
    with pytest.raises(RuntimeError):
        attn(states(), attention_mask=torch.zeros(2, 5, 5))
    assert "does not broadcast" in next(iter(coverage(attn).rows[0].fallbacks))


def test_a_processor_without_an_attention_call_is_counted_and_told() -> None:
    attn = layer(AttnProcessor())
    expected = attn(states())
    enable_fa3(attn, kernel="reference")
    with pytest.warns(FallbackWarning, match="makes no attention call that could be switched"):
        assert torch.equal(attn(states()), expected)
    enable_fa3(attn, kernel="reference", fallback="error")
    with pytest.raises(UnsupportedModelError, match="AttnProcessor makes no attention call"):
        attn(states())


def test_a_layer_set_to_another_backend_keeps_it() -> None:
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=0,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 4, 4),
        "encoder_hidden_states": torch.randn(1, 3, 8),
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.ones(1),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    expected = model(**inputs).sample
    enable_fa3(model, kernel="reference")
    for processor in model.attn_processors.values():
        processor._attention_backend = "_native_math"
    with pytest.warns(FallbackWarning, match="the layer is set to backend _native_math"):
        output = model(**inputs).sample
    torch.testing.assert_close(output, expected)
    assert coverage(model).calls == 0


class Doubling(AttnProcessor2_0):
    """A user's own processor, built on one of diffusers'."""

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, **kwargs: object) -> object:
        return 2 * super().__call__(attn, hidden_states, **kwargs)


class Named(Doubling):
    """Two steps from the class that calls attention."""

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, **kwargs: object) -> object:
        return super().__call__(attn, hidden_states, **kwargs)

    @property
    def name(self) -> str:
        return type(self).__name__

    @staticmethod
    def attend(q: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q)


@pytest.mark.parametrize("processor_class", [Doubling, Named])
def test_super_leads_to_the_kernel_too(processor_class: type) -> None:
    attn, plain = layer(processor_class()), layer(AttnProcessor2_0())
    enable_fa3(attn, kernel="reference", fallback="error")
    torch.testing.assert_close(attn(states()), 2 * plain(states()))
    assert routes(attn) == {"dense": 1}


def test_static_methods_and_properties_are_kept() -> None:
    wrapped = FA3AttnProcessor(Named())
    assert wrapped.name == "Named"
    q = torch.randn(1, 2, 3, 4)
    torch.testing.assert_close(wrapped.attend(q), F.scaled_dot_product_attention(q, q, q))


class Nested:
    """Runs another processor, as some adapters do."""

    def __init__(self, inner: object) -> None:
        self.inner = inner

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, **kwargs: object) -> object:
        return self.inner(attn, hidden_states) + F.scaled_dot_product_attention(
            *3 * [hidden_states[:, None]]
        ).squeeze(1)


def test_nested_processors_count_for_themselves() -> None:
    inner = FA3AttnProcessor(AttnProcessor2_0(), kernel="reference")
    attn = layer(Nested(inner))
    enable_fa3(attn, kernel="reference", fallback="error")
    attn(states())
    assert routes(attn) == {"dense": 1}
    assert record_of(inner) is not None
    assert dict(record_of(inner).calls) == {("reference", "dense"): 1}


def test_dropout_goes_to_the_default_attention() -> None:
    class Dropping:
        def __call__(self, attn: Attention, x: torch.Tensor, **kwargs: object) -> torch.Tensor:
            return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], dropout_p=0.5)

    wrapped = FA3AttnProcessor(Dropping(), kernel="reference", fallback="silent")
    wrapped(None, states())
    assert record_of(wrapped) is not None
    assert dict(record_of(wrapped).fallbacks) == {"attention dropout": 1}


# --- plans are found again -----------------------------------------------------------------------


class Shifting(AttnProcessor2_0):
    """Makes its mask from its arguments and from a state that the cache cannot see."""

    shift = 0

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> object:
        self.shift += 1
        mask = torch.zeros(2, 1, 6).masked_fill(~attention_mask.roll(self.shift, -1)[:, None], -1e4)
        return super().__call__(attn, hidden_states, attention_mask=mask)


class TwoCalls:
    """Two attention calls on different masks of one shape, as some of diffusers' processors do."""

    def __call__(
        self, attn: Attention, x: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        x, mask = x[:, None], attention_mask[:, None, None]
        one = F.scaled_dot_product_attention(x, x, x, attn_mask=mask.clone())
        return one + F.scaled_dot_product_attention(x, x, x, attn_mask=mask.flip(-1))


def test_a_mask_is_read_once_for_all_layers_that_are_given_it() -> None:
    layers = nn.ModuleList([layer(AttnProcessor2_0()) for _ in range(5)])
    enable_fa3(layers, kernel="reference")
    additive = torch.zeros(2, 1, 6).masked_fill(~GAP[:, None], -1e4)
    x = states()
    for attn in layers:
        x = attn(x, attention_mask=additive)  # rebuilds (B, H, 1, Sk) in each layer
    report = coverage(layers).to_dict()
    assert report["plans"] == {"made": 1, "reused": 4}
    assert [row["calls"] for row in report["layers"]] == [{"packed": 1}] * 5


def test_an_unknown_processor_has_its_masks_read_each_time() -> None:
    attn, plain = layer(Shifting()), layer(Shifting())
    enable_fa3(attn, kernel="reference", fallback="error")
    for _ in range(4):
        output = attn(states(), attention_mask=GAP)
        torch.testing.assert_close(output, plain(states(), attention_mask=GAP))
    assert coverage(attn).plans_made == 4


def test_each_attention_call_of_a_processor_has_its_own_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TwoCalls, "__module__", "diffusers.models")  # as if it were diffusers' own
    layers = [FA3AttnProcessor(TwoCalls(), kernel="reference", fallback="error") for _ in range(2)]
    mask = torch.arange(6) < torch.tensor([[2], [5]])
    for wrapped in layers:
        output = wrapped(None, states(), attention_mask=mask)
        torch.testing.assert_close(output, TwoCalls()(None, states(), attention_mask=mask))
    records = [record_of(wrapped) for wrapped in layers]
    assert [(r.plans_made, r.plans_reused) for r in records if r] == [(2, 0), (0, 2)]


def test_a_mask_edited_in_place_is_read_again() -> None:
    attn, plain = layer(AttnProcessor2_0()), layer(AttnProcessor2_0())
    enable_fa3(attn, kernel="reference", fallback="error")
    mask = torch.zeros(2, 1, 6)
    for key in (1, 2, 4):
        mask[:, :, key] = -1e4
        torch.testing.assert_close(
            attn(states(), attention_mask=mask), plain(states(), attention_mask=mask)
        )
    assert coverage(attn).plans_made == 3


# --- bad input -----------------------------------------------------------------------------------


def test_a_request_is_no_processor_and_names_the_ways_that_work() -> None:
    attn = layer(FA3AttnProcessor())
    with pytest.raises(UnsupportedModelError, match=r"enable_fa3\(model\), or wrap the processors"):
        attn(states())


@pytest.mark.parametrize("thing", [object(), "AttnProcessor", AttnProcessor2_0, lambda attn: attn])
def test_what_is_no_processor_is_refused(thing: object) -> None:
    with pytest.raises(UnsupportedModelError, match="callable object"):
        FA3AttnProcessor(thing)


def test_a_processor_without_attributes_of_its_own_is_refused() -> None:
    class Slotted:
        __slots__ = ()

        def __call__(self, *args: object) -> None: ...

    with pytest.raises(UnsupportedModelError, match="no __dict__ to share"):
        FA3AttnProcessor(Slotted())


def test_an_asked_for_kernel_that_cannot_serve_is_an_error_whatever_the_fallback() -> None:
    pytest.importorskip("torch.nn.attention.varlen")
    attn = layer(AttnProcessor2_0())
    enable_fa3(attn, kernel="torch_varlen", fallback="silent")
    with pytest.raises(KernelUnavailableError, match='kernel "torch_varlen" cannot serve float32'):
        attn(states())
