"""FA3AttnProcessor: a layer's own processor, with its attention call replaced."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Iterable
from typing import Any, cast

import torch

from diffusers_fa3.errors import UnsupportedModelError
from diffusers_fa3.kernels import KernelChoice
from diffusers_fa3.layers.frame import Frame, begin
from diffusers_fa3.layers.rebind import Helpers, bases_on_ours
from diffusers_fa3.layers.record import Fallback, LayerRecord, Settings
from diffusers_fa3.parallel import Home

WRAPPED = "_fa3_wrapped"
"""Attribute of a processor's class: the class, and that of its wrapped processors."""


class FA3AttnProcessor:
    """One layer's processor, wrapped: its projections, norms and rotary embeddings are untouched.

    The wrapped processor is an instance of the processor's own class, too. It shares attributes,
    weights and backend settings with the processor: an attribute set on either is set on both.

    Args:
        processor: the layer's processor. Without a processor, this is a request for
            `set_attn_processor` after `register()`, by which every layer keeps its own processor; a
            layer that calls a request gets an error.
        kernel: "auto", a name from `available_kernels()`, or a function; None as for `enable_fa3`.
        fallback: how a call that no kernel can serve is told, besides being counted: "warn" warns
            once for each reason, "error" raises, "silent" does neither; None as for `enable_fa3`.

    Raises:
        KernelUnavailableError: `kernel` is unknown or not installed.
        InputError: an unknown `fallback`.
        UnsupportedModelError: `processor` cannot be wrapped: it is a function, a functools.partial,
            a bound method, or has no `__dict__`.

    Example:
        >>> from diffusers.models.attention_processor import Attention, AttnProcessor2_0
        >>> from diffusers_fa3 import FA3AttnProcessor
        >>> layer = Attention(query_dim=8, heads=2, dim_head=4)
        >>> layer.set_processor(FA3AttnProcessor(layer.processor))
        >>> isinstance(layer.processor, AttnProcessor2_0)
        True
    """

    __slots__ = ("_fa3",)
    _fa3: LayerRecord

    def __new__(  # noqa: D102  # the class's docstring is its
        cls,
        processor: Any = None,
        *,
        kernel: KernelChoice | None = None,
        fallback: Fallback | None = None,
    ) -> FA3AttnProcessor:
        settings = Settings.asked(kernel, fallback)
        if processor is not None:
            return wrap(unwrap(processor), settings)
        request = super().__new__(cls)
        request._fa3 = LayerRecord(None, settings)
        return request

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass  # a wrapped processor has its state already

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: a request has no processor to run."""
        raise UnsupportedModelError(
            "FA3AttnProcessor() without a processor is a request, which set_attn_processor honours "
            "after diffusers_fa3.register(). Call enable_fa3(model), or wrap the processors: "
            "{name: FA3AttnProcessor(p) for name, p in model.attn_processors.items()}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        record = self._fa3
        if record.processor is None:
            return _request, (record.settings,)
        return wrap, (
            record.processor,
            record.settings,
            record.name,
            record.pack_queries,
            record.component,
            record.home,
        )

    def __repr__(self) -> str:
        wrapped = self._fa3.processor
        return f"FA3AttnProcessor({'' if wrapped is None else type(wrapped).__name__})"


def wrap(
    processor: Any,
    settings: Settings,
    name: str = "",
    pack_queries: bool = False,
    component: str | None = None,
    home: Home | None = None,
) -> FA3AttnProcessor:
    """`processor` with its attention calls on the kernel; the object itself stays as it is.

    Raises:
        UnsupportedModelError: it is no object of a class with a `__call__` that could be replaced,
            or one whose attributes cannot be shared, or its class allows no subclass.
    """
    cls: Any = type(processor)
    if not isinstance(_own_call(cls.__mro__), types.FunctionType):
        raise UnsupportedModelError(
            "only a callable object whose class has a method `__call__`, written in Python, can be "
            f"switched; got a {cls.__name__}"
        )
    record = LayerRecord(processor, settings, name, pack_queries, component, home)
    try:
        if not hasattr(processor, "__dict__"):
            raise AttributeError("it has no __dict__ to share")
        wrapped: FA3AttnProcessor = object.__new__(_wrapped_class(cls))
        object.__setattr__(wrapped, "__dict__", processor.__dict__)
        object.__setattr__(wrapped, "_fa3", record)
        if record_of(wrapped) is not record:
            raise AttributeError("it hands attributes on to another object")
    except UnsupportedModelError:
        raise
    except Exception as error:  # a metaclass, `__init_subclass__` or `__getattr__` may raise any
        raise UnsupportedModelError(
            f"{cls.__name__} cannot be wrapped: {error}. Leave its layers out by `layers`"
        ) from error
    return wrapped


def unwrap(processor: Any) -> Any:
    """The processor that was wrapped; any other object is returned as it is."""
    record = record_of(processor)
    return processor if record is None else record.processor


def record_of(processor: Any) -> LayerRecord | None:
    """The record of a wrapped processor; None for any other object, and for a bare request."""
    if not isinstance(processor, FA3AttnProcessor) or is_request(processor):
        return None
    return processor._fa3


def is_request(processor: Any) -> bool:
    """Whether this is `FA3AttnProcessor()`: one for every layer, each keeping its own processor."""
    return isinstance(processor, FA3AttnProcessor) and processor._fa3.processor is None


def _request(settings: Settings) -> FA3AttnProcessor:
    return FA3AttnProcessor(**settings.options())


def _ready_made_signature(call: Any) -> inspect.Signature:
    """The signature of a processor's `__call__`, which diffusers' layers read in every call.

    Reading it anew would take 8 us. Its parameters are a plain dict: Dynamo cannot trace a mapping
    proxy that was there before the graph.
    """
    signature = inspect.signature(call)
    setattr(signature, "_parameters", dict(signature.parameters))  # noqa: B010  # mypy knows no slot
    return signature


def _class_of(processor: FA3AttnProcessor, own: type) -> type:
    """`__class__` of a wrapped processor: the class of the layer's own processor.

    Dynamo of torch 2.13 looks for methods in the MRO of `__class__`. It is given the wrapped class,
    so that it finds the methods that are bound anew.
    """
    is_dynamo = sys._getframe(1).f_code.co_name == "lookup_class_mro_attr"
    return type(processor) if is_dynamo else own


def _wrapped_class(cls: type) -> type:
    """The class of wrapped processors of a class; kept on the class, so that both may go."""
    original, wrapped = vars(cls).get(WRAPPED, (None, None))
    if original is not cls:  # a class may be made of another one's attributes
        wrapped = _make_wrapped_class(cls)
        setattr(cls, WRAPPED, (cls, wrapped))
    return cast(type, wrapped)


def _make_wrapped_class(cls: type) -> type:
    helpers = Helpers.of(cls)

    @functools.wraps(cls.__call__)
    def __call__(self: FA3AttnProcessor, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            begin(self._fa3, args)
            if helpers is not None:
                helpers.follow()
        with Frame(self._fa3, args, kwargs):
            return own_call(self, *args, **kwargs)

    vars(__call__)["__signature__"] = _ready_made_signature(cls.__call__)
    # Dynamo guards the number of defaults, which None does not have.
    setattr(__call__, "__defaults__", ())  # noqa: B010  # for mypy, it is no function
    wrapped = type(cls)(
        cls.__name__,
        (FA3AttnProcessor, *bases_on_ours(cls)),
        {
            "__slots__": (),
            "__call__": __call__,
            "__class__": property(functools.partial(_class_of, own=cls)),
            "__module__": cls.__module__,
            "__doc__": cls.__doc__,
        },
    )
    _, _, *behind = wrapped.__mro__
    own_call = _own_call(behind)
    return wrapped


def _own_call(mro: Iterable[type]) -> Any:
    """A class's own `__call__`, bound anew or not; nn.Module's, where the class has a forward."""
    return next((vars(base)["__call__"] for base in mro if "__call__" in vars(base)), None)
