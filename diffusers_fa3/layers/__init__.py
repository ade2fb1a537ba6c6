"""Diffusers' attention layers on the attention of this package.

Read `enable` first (the switch), then `processor` and `rebind` (what a switched layer runs) and
`calls` (what its attention call becomes). `given` recognises a mask that a processor makes anew in
every layer; `block_masks` spares a few blocks laying out S x S; `pads` lists models that never read
padded tokens; `coverage_report` says what became of every call. `dispatcher` is `register()`.

Only this room, `parallel` and `tools` know diffusers; `host` lists its inner parts that are used.
Nothing of diffusers is patched but by `dispatcher`, and only between `register` and `unregister`.
"""

from __future__ import annotations

from diffusers_fa3.layers.dispatcher import register, unregister
from diffusers_fa3.layers.enable import coverage, disable_fa3, enable_fa3
from diffusers_fa3.layers.processor import FA3AttnProcessor

__all__ = [
    "FA3AttnProcessor",
    "coverage",
    "disable_fa3",
    "enable_fa3",
    "register",
    "unregister",
]
