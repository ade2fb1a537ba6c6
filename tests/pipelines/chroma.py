"""Chroma: T5 padding in the middle of [text, pads, image].

Its pipeline makes the mask a float of 0 and 1, which attention adds to its logits: nothing is
hidden (huggingface/diffusers#12116). With a bool mask of one's own, the padding is.
"""

from __future__ import annotations

from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from zoo.case import Inputs, prompt, randn
from zoo.chroma import CASES as ZOO

from .case import PipelineCase
from .parts import PROMPTS, TEXT, t5, t5_tokenizer, vae

CONFIG = ZOO[0].config


def _pipeline() -> ChromaPipeline:
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(CONFIG["in_channels"] // 4),
        text_encoder=t5(CONFIG["joint_attention_dim"]),
        tokenizer=t5_tokenizer(),
        transformer=ChromaTransformer2DModel(**CONFIG),
    )


def _inputs() -> Inputs:
    return {
        "prompt": PROMPTS,
        "negative_prompt": ["", ""],
        "height": 8,
        "width": 8,
        "num_inference_steps": 2,
        "max_sequence_length": TEXT,
        "latents": randn(len(PROMPTS), 16, CONFIG["in_channels"]),
    }


def _encoded() -> Inputs:
    asked = _inputs()
    del asked["prompt"], asked["negative_prompt"]
    for seed, prefix in enumerate(("", "negative_")):
        states, mask = prompt("ragged", CONFIG["joint_attention_dim"], seed=seed)
        asked |= {f"{prefix}prompt_embeds": states, f"{prefix}prompt_attention_mask": mask}
    return asked


CASES = (
    PipelineCase(
        name="chroma",
        make=_pipeline,
        inputs=_inputs,
        routes=frozenset(),
        fallback="a bias, not a mask",
    ),
    PipelineCase(
        name="chroma_bool_mask",
        make=_pipeline,
        inputs=_encoded,
        routes=frozenset({"packed"}),
        masked=True,
    ),
)
