"""FLUX.2 with a key-value cache of its reference image: no call has a mask.

The first step splits [text, reference, image] in two calls, reference over reference and the rest
over everything; the next ones attend from [text, image] over keys that include those kept from the
reference.
"""

from __future__ import annotations

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import (
    Flux2KVAttnProcessor,
    Flux2KVParallelSelfAttnProcessor,
)
from torch import nn

from .case import BATCH, TEXT, Case, Inputs, Layout, randn
from .flux import IMAGE
from .flux2 import CONFIG, inputs, position_ids

REFERENCE = 4


class TwoSteps(Flux2Transformer2DModel):
    """The first two steps of diffusers' pipeline for key-value caches in one forward.

    Returned with their outputs are the reference's rows of the last block. They lead nowhere, but
    without them nobody would see the last of the reference's attention calls.
    """

    def forward(
        self, hidden_states: torch.Tensor, img_ids: torch.Tensor, **inputs: object
    ) -> tuple[torch.Tensor]:
        """Run both steps; image tokens and their positions are those of [reference, image]."""
        last_rows: list[torch.Tensor] = []
        with self.single_transformer_blocks[-1].register_forward_hook(
            lambda block, args, rows: last_rows.append(rows[:, TEXT : TEXT + REFERENCE])
        ):
            first, cache = super().forward(
                hidden_states,
                img_ids=img_ids,
                kv_cache_mode="extract",
                num_ref_tokens=REFERENCE,
                **inputs,
            )
        (second,) = super().forward(
            hidden_states[:, REFERENCE:],
            img_ids=img_ids[REFERENCE:],
            kv_cache=cache,
            kv_cache_mode="cached",
            **inputs,
        )
        return (torch.cat([first, second, self.proj_out(last_rows[0])], dim=1),)


def use_key_value_caches(transformer: nn.Module) -> None:
    """Set the processors that diffusers' pipeline for key-value caches sets."""
    for block in transformer.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in transformer.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())


def _inputs(layout: Layout, pads: float) -> Inputs:
    return {
        **inputs(layout, pads),
        "hidden_states": randn(BATCH, REFERENCE + IMAGE, 4),
        "img_ids": torch.cat(
            [position_ids(time=10, rows=2, columns=2), position_ids(rows=4, columns=4)]
        ),
    }


CASES = (
    Case(
        name="flux2_kv_cache",
        model=TwoSteps,
        config=CONFIG,
        inputs=_inputs,
        prepare=use_key_value_caches,
    ),
)
