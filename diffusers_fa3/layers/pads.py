"""Models in which nothing reads what attention gives for padded tokens: they need no queries."""

from __future__ import annotations

import re

from torch import nn

from diffusers_fa3.errors import UnsupportedModelError

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
"""Model class -> its layers, by name, in which tokens attend to each other under their own mask.

Here the model itself makes the mask, of text alone or of what it pads by itself, masks these tokens
in every layer and returns none of them: `tests/test_pack_queries.py`. Where a caller's mask comes
to the attention as it is, as in Flux, it may mask tokens that are returned.
"""


def layers_that_pack_queries(model: nn.Module) -> set[str]:
    """Names of the modules of a model in which padded tokens may be left out as queries.

    Raises:
        UnsupportedModelError: it is not known to leave their rows unread.
    """
    name = type(model).__name__
    if name not in PADS_UNREAD:
        raise UnsupportedModelError(
            f"pack_queries is for models that never read padded tokens: {', '.join(PADS_UNREAD)}; "
            f"got {name}. Switch those by themselves"
        )
    return {layer for layer, _ in model.named_modules() if re.search(PADS_UNREAD[name], layer)}
