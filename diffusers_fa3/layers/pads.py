"""Models that never read attention's output at padded tokens, which then need no queries."""

from __future__ import annotations

import re

from torch import nn

from diffusers_fa3.errors import UnsupportedModelError
from diffusers_fa3.layers.block_masks import class_in_diffusers

PADS_UNREAD = {
    "ErnieImageTransformer2DModel": r"",
    "HunyuanImageTransformer2DModel": r"^(single_)?transformer_blocks\.",
    "HunyuanVideoFramepackTransformer3DModel": r"^(single_)?transformer_blocks\.",
    "HunyuanVideoTransformer3DModel": r"^(single_)?transformer_blocks\.",
    "Krea2Transformer2DModel": r"^transformer_blocks\.",
    "Lumina2Transformer2DModel": r"^(context_refiner|layers)\.",
    "MotifVideoTransformer3DModel": r"^(single_)?transformer_blocks\.\d+\.attn$",
    "QwenImageControlNetModel": r"",
    "QwenImageTransformer2DModel": r"",
    "ZImageTransformer2DModel": r"^(context_refiner|layers)\.",
}
"""Model class -> regular expression for the names of its self-attention layers that qualify.

The model builds the mask itself. The mask marks padded text, or tokens that the model itself added
as padding. The model masks these tokens in every layer and returns none of them, as
`tests/test_pack_queries.py` checks. A model that passes the caller's mask on to attention, as Flux
does, is not listed: such a mask may cover tokens that the model returns.

A subclass counts as the class of diffusers that it is made from.
"""

_WRAPPERS = re.compile(r"\._\w+")
"""What wrappers of blocks add to the names of layers, such as `_orig_mod` of `torch.compile`."""


def layers_that_pack_queries(model: nn.Module) -> set[str]:
    """Names of the modules of a model in which padded tokens may be left out as queries.

    The model may be wrapped, as by DistributedDataParallel, peft or `torch.compile`.

    Raises:
        UnsupportedModelError: neither the model nor a module below it is of a class that
            `PADS_UNREAD` lists.
    """
    modules = list(model.named_modules())
    classes = {module: class_in_diffusers(module) for _, module in modules}
    known = [(name, module) for name, module in modules if classes[module] in PADS_UNREAD]
    if not known:
        got = next(filter(None, classes.values()), type(model).__name__)
        raise UnsupportedModelError(
            f"pack_queries is for models that never read padded tokens: {', '.join(PADS_UNREAD)}; "
            f"got {got}. Switch those by themselves"
        )
    return {
        ".".join(filter(None, (prefix, layer)))
        for prefix, module in known
        for layer, _ in module.named_modules()
        if re.search(PADS_UNREAD[classes[module]], _WRAPPERS.sub("", layer))
    }
