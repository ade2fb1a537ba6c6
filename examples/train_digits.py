"""Train the small text-to-image pipeline in `examples/digits` from scratch.

    python examples/train_digits.py --out examples/digits

The result is a stock `QwenImagePipeline`: a prompt such as "a picture of the digit seven" goes
through a tiny Qwen2.5-VL text encoder (random, frozen: its embeddings need only tell words apart)
and conditions a tiny Qwen-Image transformer by joint attention over [text, padding, picture].

Data: "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository, licence CC BY 4.0; the 1,797 pictures of 8x8 pixels that come with scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.training_utils import EMAModel
from digits_task import (
    MODEL_DIR,
    PICTURE_SIZE,
    PROMPTS,
    SAMPLING_STEPS,
    draw_in_turn,
    fit_reader,
    share_named,
)
from loading import load_pipeline
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

LATENT_CHANNELS = 2
TEXT_SIZE = 64
PAD, *TURN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

MODEL_CARD = """\
---
license: cc-by-4.0
library_name: diffusers
pipeline_tag: text-to-image
---

# Handwritten digits from a prompt

A stock diffusers `QwenImagePipeline` with {parameters:,} parameters, for trying and testing
attention kernels where a real model is too large. Load it with
`DiffusionPipeline.from_pretrained("examples/digits")` and ask for "seven", "the number 7" or
"a handwritten picture of the number seven, please": {size}x{size} pixels in {sampling_steps} steps,
with `true_cfg_scale=1.0`. It knows the prompts in `examples/digits_task.py` and nothing else.

Every layer attends over [text, padding, picture]: prompts of different lengths in one batch make a
key mask with a gap in the middle.

- Made, this card included, by `python examples/train_digits.py {options}`
  with torch {torch} and diffusers {diffusers}: {wall_minutes:.1f} minutes on a CPU,
  {cpu_minutes:.1f} minutes of CPU time over all threads.
- A support vector classifier fitted on the real digits names {accuracy:.1%} of {count} generated
  ones correctly (every digit and every prompt template equally often).
- The transformer and the VAE are stored in half precision and load as float32.
- Data: "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning
  Repository, https://archive.ics.uci.edu/dataset/80, licence CC BY 4.0; the 1,797 pictures that
  come with scikit-learn, enlarged from 8x8.
"""


# ---------------------------------------------------------------------------------- components


def make_tokenizer() -> Qwen2Tokenizer:
    """Learn byte pairs until every word of the pipeline's template and the prompts is one token."""
    template = prompt_template()
    for token in TURN_TOKENS:
        template = template.replace(token, "")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=[PAD, *TURN_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((template.format(p) for same in PROMPTS for p in same), trainer)
    learned = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        extra_special_tokens=TURN_TOKENS,
    )


def prompt_template() -> str:
    return QwenImagePipeline(*[None] * 5).prompt_template_encode


def make_text_encoder(vocab_size: int) -> Qwen2_5_VLForConditionalGeneration:
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": TEXT_SIZE,
            "intermediate_size": TEXT_SIZE,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_scaling": {"mrope_section": [4, 6, 6], "rope_type": "default"},
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        # The class cannot do without a vision tower; the pipeline never runs it.
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "patch_size": 2,
            "out_hidden_size": TEXT_SIZE,
        },
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False)


def make_pipeline() -> QwenImagePipeline:
    """Put together the untrained pipeline: 32x32 pixels, 2x8x8 latents, 16 picture tokens."""
    tokenizer = make_tokenizer()
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, False],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=3,
        num_attention_heads=3,
        attention_head_dim=32,
        joint_attention_dim=TEXT_SIZE,
        axes_dims_rope=(8, 12, 12),
    )
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=make_text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    check_prompt_prefix(pipe)
    return pipe


def check_prompt_prefix(pipe: QwenImagePipeline) -> None:
    """The pipeline drops a fixed number of tokens: it must be the template before the prompt."""
    prefix = pipe.prompt_template_encode.split("{}")[0]
    tokens = len(pipe.tokenizer(prefix).input_ids)
    assert tokens == pipe.prompt_template_encode_start_idx, tokens


# ------------------------------------------------------------------------------------ training


def load_pictures() -> tuple[Tensor, Tensor]:
    """Return (N, 3, 1, 32, 32) pictures in [-1, 1], one frame each, and their (N,) labels."""
    pixels, labels = load_digits(return_X_y=True)
    small = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    large = F.interpolate(small, size=PICTURE_SIZE, mode="bicubic").clamp(-1, 1)
    return large.expand(-1, 3, -1, -1).unsqueeze(2), torch.tensor(labels)


def learning_rate(peak: float, done: float, warmup: float = 0.03) -> float:
    """Rise linearly, then follow a cosine down to zero."""
    if done < warmup:
        return peak * (done + 1e-3) / warmup
    return peak * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup))) / 2


def fit(
    name: str,
    module: torch.nn.Module,
    loss_of_batch: Callable[[], Tensor],
    *,
    peak: float,
    steps: int,
) -> None:
    """Minimise `loss_of_batch()` with AdamW; `module` ends up with the averaged weights."""
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01, betas=(0.9, 0.98))
    average = EMAModel(parameters, decay=0.998, use_ema_warmup=True, power=0.8)
    module.train()
    for step in tqdm(range(steps), desc=name, unit="step"):
        optimizer.param_groups[0]["lr"] = learning_rate(peak, step / steps)
        loss_of_batch().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(parameters)
    average.copy_to(parameters)
    module.eval()


def train_vae(
    vae: AutoencoderKLQwenImage, pictures: Tensor, *, steps: int, batch: int = 32
) -> None:
    """Train for reconstruction, with a slight pull of the latents towards a normal distribution."""

    def loss_of_batch() -> Tensor:
        real = pictures[torch.randint(len(pictures), (batch,))]
        latents = vae.encode(real).latent_dist
        decoded = vae.decode(latents.sample()).sample
        return F.l1_loss(decoded, real) + F.mse_loss(decoded, real) + 1e-4 * latents.kl().mean()

    fit("vae", vae, loss_of_batch, peak=4e-3, steps=steps)


@torch.no_grad()
def encode_pictures(vae: AutoencoderKLQwenImage, pictures: Tensor) -> Tensor:
    """Return normalised (N, C, 8, 8) latents; their mean and scale go into the VAE's config."""
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(256)])
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return ((latents - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)).squeeze(2)


def train_transformer(
    pipe: QwenImagePipeline, latents: Tensor, labels: Tensor, *, steps: int, batch: int = 128
) -> None:
    """Learn the flow from pictures to noise, with padded prompts and their mask."""
    height, width = latents.shape[-2] // 2, latents.shape[-1] // 2
    packed = F.pixel_unshuffle(latents, 2).flatten(2).mT  # a token is a patch of 2x2 latents
    templates = len(PROMPTS[0])
    text, mask = pipe.encode_prompt([prompt for same in PROMPTS for prompt in same])

    def loss_of_batch() -> Tensor:
        picked = torch.randint(len(packed), (batch,))
        prompts = labels[picked] * templates + torch.randint(templates, (batch,))
        clean = packed[picked]
        noise = torch.randn_like(clean)
        sigma = torch.sigmoid(torch.randn(batch))
        predicted = pipe.transformer(
            hidden_states=torch.lerp(clean, noise, sigma.view(-1, 1, 1)),
            encoder_hidden_states=text[prompts],
            encoder_hidden_states_mask=mask[prompts],
            timestep=sigma,
            img_shapes=[[(1, height, width)]] * batch,
        ).sample
        return F.mse_loss(predicted, noise - clean)

    fit("transformer", pipe.transformer, loss_of_batch, peak=2e-3, steps=steps)


# ----------------------------------------------------------------------------------------- main


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="folder for the pipeline")
    parser.add_argument("--vae-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=3000, help="steps of the transformer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="rounding depends on their number")
    return parser.parse_args()


def count_parameters(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    wall, cpu = time.monotonic(), time.process_time()

    pipe = make_pipeline()
    pictures, labels = load_pictures()
    train_vae(pipe.vae, pictures, steps=args.vae_steps)
    train_transformer(pipe, encode_pictures(pipe.vae, pictures), labels, steps=args.steps)
    minutes = (time.monotonic() - wall) / 60, (time.process_time() - cpu) / 60

    parameters = sum(
        count_parameters(part) for part in (pipe.vae, pipe.text_encoder, pipe.transformer)
    )
    # For the size only: diffusers loads float32 unless told otherwise (transformers would not).
    pipe.vae.half()
    pipe.transformer.half()
    pipe.save_pretrained(args.out)

    saved = load_pipeline(args.out)
    saved.set_progress_bar_config(desc="digits")
    images, asked = draw_in_turn(saved)
    card = MODEL_CARD.format(
        parameters=parameters,
        size=PICTURE_SIZE,
        sampling_steps=SAMPLING_STEPS,
        options=f"--vae-steps {args.vae_steps} --steps {args.steps} "
        f"--seed {args.seed} --threads {args.threads}",
        wall_minutes=minutes[0],
        cpu_minutes=minutes[1],
        torch=torch.__version__.partition("+")[0],
        diffusers=diffusers.__version__,
        accuracy=share_named(fit_reader(), images, asked),
        count=len(asked),
    )
    (args.out / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
