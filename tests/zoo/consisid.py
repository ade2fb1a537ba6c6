"""ConsisID: CogVideoX with rotary embeddings and a face; no mask.

The face is mixed in by perceivers that compute softmax attention by hand, out of everyone's reach;
the attention of the blocks is as in CogVideoX.
"""

from __future__ import annotations

from diffusers import ConsisIDTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from .case import BATCH, TEXT, Case, Inputs, Layout, randn, timesteps

HEADS = 2
HEAD_DIM = 64
FACE = 8  # width of the face's features


def _inputs(layout: Layout, pads: float) -> Inputs:
    return {
        "hidden_states": randn(BATCH, 2, 4, 8, 8),
        "encoder_hidden_states": randn(BATCH, TEXT, 16, seed=1),
        "timestep": timesteps(1000),
        "image_rotary_emb": get_3d_rotary_pos_embed(HEAD_DIM, ((0, 0), (4, 4)), (4, 4), 2),
        "id_cond": randn(BATCH, FACE, seed=2),
        "id_vit_hidden": [randn(BATCH, 3, FACE, seed=3)],
    }


CASES = (
    Case(
        name="consisid",
        model=ConsisIDTransformer3DModel,
        config={
            "num_attention_heads": HEADS,
            "attention_head_dim": HEAD_DIM,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 16,
            "text_embed_dim": 16,
            "num_layers": 2,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": TEXT,
            "use_rotary_positional_embeddings": True,
            "is_train_face": True,
            "cross_attn_dim_head": 16,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": FACE,
            "LFE_vit_dim": FACE,
            "LFE_depth": 1,
            "LFE_num_scale": 1,
            "LFE_dim_head": FACE,
            "LFE_num_heads": 1,
            "LFE_num_id_token": 1,
            "LFE_num_querie": 2,
            "LFE_output_dim": HEADS * HEAD_DIM * 2 // 3,
            "LFE_ff_mult": 1,
        },
        inputs=_inputs,
    ),
)
