"""register / unregister: "fa3" under the names by which diffusers switches attention.

The one file that patches diffusers, and only between `register()` and `unregister()`. `register`
names everything that is patched, private names included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, ModularPipeline
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention
from torch import Tensor

from diffusers_fa3.errors import UnsupportedModelError
from diffusers_fa3.layers.calls import try_dispatched
from diffusers_fa3.layers.enable import disable_fa3, enable_fa3, leave, mark_switched
from diffusers_fa3.layers.find import models_of
from diffusers_fa3.layers.frame import Frame, begin
from diffusers_fa3.layers.processor import is_request, record_of, unwrap, wrap
from diffusers_fa3.layers.record import LayerRecord, Settings

NAME = "fa3"

_undo: list[Callable[[], None]] = []


def register() -> None:
    """Teach diffusers the name "fa3", for this process, until `unregister()`. Twice is harmless.

    These work then, on any model or pipeline:

        pipe.set_attn_processor(FA3AttnProcessor())
        model.set_attn_processor(FA3AttnProcessor())      where diffusers has that method
        model.set_attention_backend("fa3")                as enable_fa3(model); any other name, and
                                                          reset_attention_backend, as disable_fa3
        with attention_backend("fa3"): ...                all layers that use diffusers' dispatcher

    `attention_backend` switches the process, not layers: no coverage report has its calls. A call
    that no kernel can serve goes to the native backend, with a warning.

    Example:
        >>> from diffusers.models.attention_processor import Attention
        >>> from diffusers_fa3 import FA3AttnProcessor, register, unregister
        >>> layer = Attention(query_dim=8, heads=2, dim_head=4)
        >>> register()
        >>> layer.set_processor(FA3AttnProcessor())
        >>> unregister()
        >>> layer.processor  # stays switched
        FA3AttnProcessor(AttnProcessor2_0)
    """
    if _undo:
        return
    Settings.asked(None, None)  # an error about the environment comes before any patch
    for layer_class in (Attention, AttentionModuleMixin):
        _patch(layer_class, "set_processor", _set_processor)
    for pipeline_class in (DiffusionPipeline, ModularPipeline):
        _patch(pipeline_class, "set_attn_processor", _set_attn_processor)
    _patch(ModelMixin, "set_attention_backend", _set_attention_backend)
    _patch(ModelMixin, "reset_attention_backend", _reset_attention_backend)
    _add_backend()


def unregister() -> None:
    """Take back all that `register()` did; layers that were switched meanwhile stay switched.

    Example:
        >>> from diffusers import DiffusionPipeline
        >>> from diffusers_fa3 import register, unregister
        >>> register()
        >>> hasattr(DiffusionPipeline, "set_attn_processor")
        True
        >>> unregister()
        >>> hasattr(DiffusionPipeline, "set_attn_processor")
        False
    """
    while _undo:
        _undo.pop()()


def _patch(target: type, name: str, replacement: Callable[..., Any]) -> None:
    """Put `replacement`, which takes the original (or None) first, in the place of a method."""
    original = vars(target).get(name)

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(self, original, *args, **kwargs)

    if original is not None:
        functools.update_wrapper(patched, original)
    setattr(target, name, patched)
    _undo.append(
        functools.partial(delattr, target, name)
        if original is None
        else functools.partial(setattr, target, name, original)
    )


def _set_processor(layer: Any, original: Callable[..., None], processor: Any) -> None:
    if is_request(processor):
        settings = processor._fa3.settings
        try:
            processor = wrap(unwrap(layer.processor), settings)
        except UnsupportedModelError as error:
            leave(layer, str(error), settings)
            return
        mark_switched(layer)
    original(layer, processor)


def _set_attn_processor(pipe: Any, original: Callable[..., None] | None, processor: Any) -> None:
    """Set the attention processors of the pipeline's denoisers; as the method of models."""
    if is_request(processor):
        enable_fa3(pipe, **processor._fa3.settings.options())
    elif original is not None:
        original(pipe, processor)
    else:
        models: list[Any] = [model for _, model in models_of(pipe)]
        for model in models:
            model.set_attn_processor(processor)


def _set_attention_backend(model: Any, original: Callable[..., None], backend: str) -> None:
    if getattr(backend, "value", backend).lower() == NAME:
        model.reset_attention_backend()  # another one that was set before would go on to serve
        enable_fa3(model)
        return
    original(model, backend)
    _switch_off(model)


def _reset_attention_backend(model: Any, original: Callable[..., None]) -> None:
    original(model)
    _switch_off(model)


def _switch_off(model: Any) -> None:
    if any(record_of(getattr(module, "processor", None)) for module in model.modules()):
        disable_fa3(model)


def _add_backend() -> None:
    """A row for the process-wide registry, whose keys are members of an enum."""
    member = str.__new__(AttentionBackendName, NAME)
    member._name_, member._value_ = NAME.upper(), NAME
    before = vars(AttentionBackendName).get("_missing_")

    def missing(cls: type, value: object) -> Any:
        return member if value == NAME else None

    type.__setattr__(AttentionBackendName, "_missing_", classmethod(missing))
    native = _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE]
    _AttentionBackendRegistry.register(member, supports_context_parallel=True)(
        _backend_before(native)
    )

    def undo() -> None:
        if _AttentionBackendRegistry._active_backend is member:
            _AttentionBackendRegistry._active_backend = AttentionBackendName.NATIVE
        for table in ("_backends", "_constraints", "_supported_arg_names"):
            del getattr(_AttentionBackendRegistry, table)[member]
        _AttentionBackendRegistry._supports_context_parallel.discard(NAME)
        if before is None:
            type.__delattr__(AttentionBackendName, "_missing_")
        else:
            type.__setattr__(AttentionBackendName, "_missing_", before)

    _undo.append(undo)


def _backend_before(native: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Backend "fa3" of diffusers' dispatcher, with the arguments of the native one, by name."""
    record = LayerRecord(None, Settings.asked(None, None), 'attention_backend("fa3")')

    @functools.wraps(native)
    def backend(**call: Any) -> Tensor:
        if not torch.compiler.is_compiling():
            begin(record, ())  # it knows no layers: each call may be of another forward
        out = try_dispatched(
            Frame(record, (), {}),
            call["query"],
            call["key"],
            call["value"],
            mask=call.get("attn_mask"),
            dropout_p=call.get("dropout_p", 0.0),
            causal=call.get("is_causal", False),
            scale=call.get("scale"),
            parallel_config=call.get("_parallel_config"),
        )
        return native(**call) if out is None else out

    return backend
