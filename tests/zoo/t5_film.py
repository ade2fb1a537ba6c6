"""T5 with FiLM, of Spectrogram Diffusion: attention written out as baddbmm, softmax and bmm.

Cross attention adds 0 or -1e10 per (query, key): key padding of notes and of context, the same in
every row, and logits are not scaled. Its forward has no `return_dict` and returns a bare tensor.
"""

from __future__ import annotations

import torch
from diffusers import T5FilmDecoder

from .case import BATCH, Case, Inputs, Layout, prompt, randn, timesteps

FRAMES = 8
WIDTH = 128


class Decoder(T5FilmDecoder):
    """The decoder, called the way a case calls a model."""

    def forward(self, return_dict: bool, **inputs: object) -> tuple[torch.Tensor]:
        return (super().forward(**inputs),)


def _inputs(layout: Layout, pads: float) -> Inputs:
    notes, notes_mask = prompt(layout, WIDTH, pads)
    context, context_mask = prompt(layout, WIDTH, pads, length=FRAMES, seed=2)
    return {
        "encodings_and_masks": [(notes, notes_mask.float()), (context, context_mask.float())],
        "decoder_input_tokens": randn(BATCH, FRAMES, 4),
        "decoder_noise_time": timesteps(),
    }


CASES = (
    Case(
        name="t5_film",
        model=Decoder,
        config={
            "input_dims": 4,
            "targets_length": FRAMES,
            "d_model": WIDTH,
            "num_layers": 1,
            "num_heads": 2,
            "d_kv": 64,
            "d_ff": 32,
        },
        inputs=_inputs,
        layouts=("all_true", "right", "left", "ragged", "gap"),
        unreached="diffusers' AttnProcessor computes scores and softmax itself",
    ),
)
