"""Diffusers' attention layers, run on the attention of this package.

Read `enable` first: it switches the layers that `find` finds. `processor` and `rebind` make the
processor that a switched layer runs; `names` renames the attention calls in its code. These calls
reach the functions in `calls`, which ask the `frame` of the running layer for a kernel. `record`
counts each call, and `coverage_report` builds the report.

`given` recognises a mask that a processor rebuilds in every layer. `block_masks` saves a few blocks
from building an S x S mask. `pads` lists the models that never read attention's output at padded
tokens. `dispatcher` is `register()` and `unregister()`.

Only `layers`, `parallel` and `tools` import diffusers. `host` lists the diffusers internals that
are used. Only `dispatcher` patches diffusers, and only between `register()` and `unregister()`.
"""

from __future__ import annotations

from diffusers_fa3.layers.dispatcher import register, unregister
from diffusers_fa3.layers.enable import coverage, disable_fa3, enable_fa3
from diffusers_fa3.layers.frame import Frame, begin
from diffusers_fa3.layers.processor import FA3AttnProcessor, record_of
from diffusers_fa3.layers.record import VARIABLES, LayerRecord

__all__ = [
    "VARIABLES",
    "FA3AttnProcessor",
    "Frame",
    "LayerRecord",
    "begin",
    "coverage",
    "disable_fa3",
    "enable_fa3",
    "record_of",
    "register",
    "unregister",
]
