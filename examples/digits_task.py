"""What the digit examples share: the prompts, how to draw them, and a reader for the pictures.

Importing this module loads neither diffusers nor scikit-learn; the functions do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from sklearn.svm import SVC

MODEL_DIR = Path(__file__).parent / "digits"
PICTURE_SIZE = 32  # pixels; the original digits have 8
SAMPLING_STEPS = 12

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Of many lengths on purpose: a batch of them needs a mask.
TEMPLATES = (
    "{word}",
    "{digit}",
    "a {word}",
    "the digit {word}",
    "the number {digit}",
    "a handwritten {word}",
    "a picture of the digit {word}",
    "a small picture of a handwritten {digit}",
    "a handwritten picture of the number {word}, please",
    "please draw the digit {word} by hand, in white on a black background",
)


def prompt_for(digit: int, i: int) -> str:
    """Ask for `digit` in the words of template `i`, counted modulo their number."""
    return TEMPLATES[i % len(TEMPLATES)].format(word=WORDS[digit], digit=digit)


# PROMPTS[digit][i]
PROMPTS = tuple(tuple(prompt_for(d, i) for i in range(len(TEMPLATES))) for d in range(10))


def draw(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int = SAMPLING_STEPS,
    **options: object,
) -> np.ndarray:
    """Draw one picture per prompt, each from the noise of its own seed.

    The noise is made on the CPU in float32, so that a seed gives the same picture on every device,
    in every precision and in every batch. `options` go on to the pipeline.

    Returns:
        (B, 32, 32, 3) pixels in [0, 1], float32.
    """
    tokens = (PICTURE_SIZE // pipe.vae_scale_factor // 2) ** 2
    channels = pipe.transformer.config.in_channels
    noise = [
        torch.randn(tokens, channels, generator=torch.Generator().manual_seed(seed))
        for seed in seeds
    ]
    return pipe(
        list(prompts),
        latents=torch.stack(noise).to(pipe.device, pipe.dtype),
        num_inference_steps=steps,
        true_cfg_scale=1.0,
        height=PICTURE_SIZE,
        width=PICTURE_SIZE,
        output_type="np",
        **options,
    ).images


def draw_in_turn(
    pipe: DiffusionPipeline, count: int = 200, batch: int = 100
) -> tuple[np.ndarray, list[int]]:
    """Draw `count` pictures, the digits in turn and, ten by ten, the templates in turn.

    Returns:
        (count, 32, 32, 3) pixels in [0, 1], and the digits that were asked for.
    """
    asked = [i % 10 for i in range(count)]
    prompts = [prompt_for(digit, i // 10) for i, digit in enumerate(asked)]
    parts = [range(count)[start : start + batch] for start in range(0, count, batch)]
    images = [draw(pipe, prompts[part.start : part.stop], seeds=part) for part in parts]
    return np.concatenate(images), asked


def fit_reader() -> SVC:
    """Fit a support vector classifier on the real 8x8 digits."""
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    pixels, labels = load_digits(return_X_y=True)
    return SVC(gamma=0.001, C=10).fit(pixels, labels)


def shrink(images: np.ndarray) -> np.ndarray:
    """Bring (B, H, W, 3) pixels in [0, 1] back to the data's (B, 64) values in 0..16."""
    batch, height, width, _ = images.shape
    cells = images.mean(axis=-1).reshape(batch, 8, height // 8, 8, width // 8)
    return 16 * cells.mean(axis=(2, 4)).reshape(batch, 64)


def read_digits(reader: SVC, images: np.ndarray) -> list[int]:
    """Name the digit in each of the (B, H, W, 3) pictures with pixels in [0, 1]."""
    return reader.predict(shrink(images)).tolist()


def share_named(reader: SVC, images: np.ndarray, asked: Sequence[int]) -> float:
    """Return the share of the pictures in which `reader` sees the digit that was asked for."""
    read = read_digits(reader, images)
    return sum(a == r for a, r in zip(asked, read, strict=True)) / len(asked)
