r"""Train a LoRA through a kernel that has a backward, beside the same on the default attention.

    python examples/lora_training.py
    python examples/lora_training.py --model Qwen/Qwen-Image --device cuda --size 256 --out lora

The LoRA learns digits in black on white. Both trainings begin with the same weights and see the
same pictures, prompts and noise, so their losses stay together. The prompts of a batch differ in
length, so every attention call has a mask. "auto" takes a kernel that has a backward; without one,
the default attention serves, and the coverage says so.

The first line trains the digits of `examples/digits` on a CPU, with the kernel `reference`. Another
`--model` must be a Qwen-Image. That, and the GPU, were not run yet. It needs diffusers 0.37.

Exit status: 0 if FA3 served every call, with the default's losses and finite gradients; 1 if not; 2
if the program cannot start.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from comparison import stop
from diffusers import QwenImagePipeline
from digits_task import MODEL_DIR, PICTURE_SIZE, prompt_for
from loading import load_pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from torch.nn import functional as F
from train_digits import load_pictures

from diffusers_fa3 import FA3Error, coverage, enable_fa3

BATCH, RATE = 8, 3e-3
Step = tuple[dict[str, Any], Tensor]  # the transformer's arguments, and what it is to give


@torch.no_grad()
def make_steps(pipe: QwenImagePipeline, args: argparse.Namespace) -> list[Step]:
    """For each step: digits in latents, with noise, their prompts, and the flow to the noise."""
    vae, device, dtype = pipe.vae, pipe.device, pipe.dtype
    pictures, labels = load_pictures()
    generator = torch.Generator().manual_seed(0)
    mean, std = (
        torch.tensor(values, device=device, dtype=dtype).view(1, -1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    steps = []
    for _ in range(args.steps):
        picked = torch.randint(len(pictures), (BATCH,), generator=generator)
        frames = F.interpolate(-pictures[picked].squeeze(2), size=args.size).unsqueeze(2)
        latents = (vae.encode(frames.to(device, dtype)).latent_dist.mean.squeeze(2) - mean) / std
        clean = F.pixel_unshuffle(latents, 2).flatten(2).mT  # a token is a patch of 2x2 latents
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        sigma = torch.rand(BATCH, generator=generator).to(clean)
        text, mask = pipe.encode_prompt([prompt_for(int(labels[n]), int(n)) for n in picked])
        inputs = {
            "hidden_states": torch.lerp(clean, noise, sigma.view(-1, 1, 1)),
            "encoder_hidden_states": text,
            "encoder_hidden_states_mask": mask,
            "timestep": sigma,
            "img_shapes": [[(1, latents.shape[-2] // 2, latents.shape[-1] // 2)]] * BATCH,
        }
        steps.append((inputs, noise - clean))
    return steps


def train(pipe: QwenImagePipeline, lora: list[Tensor], steps: list[Step]) -> list[list[float]]:
    """Train `lora`; return the loss of each step, and the norm of its gradients."""
    optimizer = torch.optim.AdamW(lora, lr=RATE)
    done = []
    for inputs, target in steps:
        optimizer.zero_grad()
        loss = F.mse_loss(pipe.transformer(**inputs).sample.float(), target.float())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(lora, 1.0)
        optimizer.step()
        done.append([loss.item(), norm.item()])
    return done


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Not tested: models other than the digits; --device cuda.",
    )
    parser.add_argument("--kernel", default="auto", help="a name from `available_kernels()`")
    parser.add_argument(
        "--model", default=MODEL_DIR, help="a Qwen-Image: name on the hub, or a folder"
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--size", type=int, default=PICTURE_SIZE, help="height and width")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="save the LoRA in this folder; default: nowhere")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        return stop("there is no CUDA device here; leave --device out to run on the CPU")
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    torch.manual_seed(0)
    try:
        pipe = load_pipeline(args.model, args.device, dtype)
        if not isinstance(pipe, QwenImagePipeline):
            return stop(f"--model must be a Qwen-Image; got a {type(pipe).__name__}")
        steps = make_steps(pipe, args)
        pipe.transformer.requires_grad_(False)
        pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"]))
        lora = [weight for weight in pipe.transformer.parameters() if weight.requires_grad]
        start = [weight.detach().clone() for weight in lora]
        default = train(pipe, lora, steps)
        for weight, value in zip(lora, start):
            weight.data.copy_(value)
        enable_fa3(pipe, kernel=args.kernel, fallback="silent")  # the coverage tells
        ours = train(pipe, lora, steps)
    except (FA3Error, OSError, ValueError) as error:  # OSError, ValueError: no such model
        return stop(error)

    report = coverage(pipe)
    print(report)
    print("step  loss: default, FA3  norm of gradients: default, FA3")
    for step, ((loss, norm), (our_loss, our_norm)) in enumerate(zip(default, ours)):
        print(f"{step:4}  {loss:13.6f} {our_loss:.6f}  {norm:23.6f} {our_norm:.6f}")
    # 3e-4 in float32, where rounding makes some 1e-7: it grows from update to update. Wrong
    # gradients differ by far more.
    allowed = math.sqrt(torch.finfo(dtype).eps)
    furthest = (torch.tensor(ours) / torch.tensor(default) - 1).abs().max().item()
    print(f"FA3 - default, relative: at most {furthest:.1e}; allowed: {allowed:.1e}")
    if args.out:
        weights = get_peft_model_state_dict(pipe.transformer)
        pipe.save_lora_weights(args.out, transformer_lora_layers=weights)
        print(f"LoRA: {args.out}")

    if report.fallbacks:
        print("FAILED: the default attention served some calls, for the reasons above")
    if not (close := furthest <= allowed):  # NaN is not
        print("FAILED: losses or gradients are not finite, or not those of the default")
    return 0 if close and not report.fallbacks else 1


if __name__ == "__main__":
    sys.exit(main())
