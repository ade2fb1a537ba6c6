"""Models that never read attention's output at padded tokens, which then need no queries."""

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
"""Model class -> regular expression for the names of its self-attention layers that qualify.

The model builds the mask itself. The mask marks padded text, or tokens that the model itself added
as padding. The model masks these tokens in every layer and returns none of them, as
`tests/test_pack_queries.py` checks. A model that passes the caller's mask on to attention, as Flux
does, is not listed: such a mask may cover tokens that the model returns.
"""


def layers_that_pack_queries(model: nn.Module) -> set[str]:
    """Names of the modules of a model in which padded tokens may be left out as queries.

    Raises:
        UnsupportedModelError: the model's class is not in `PADS_UNREAD`.
    """
    name = type(model).__name__
    if name not in PADS_UNREAD:
        raise UnsupportedModelError(
            f"pack_queries is for models that never read padded tokens: {', '.join(PADS_UNREAD)}; "
            f"got {name}. Switch those by themselves"
        )
    return {layer for layer, _ in model.named_modules() if re.search(PADS_UNREAD[name], layer)}
