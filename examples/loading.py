"""Load a pipeline without a word: no progress bars, no warning about a renamed argument."""

from __future__ import annotations

import warnings
from pathlib import Path

import diffusers
import torch
import transformers


def load_pipeline(
    model: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> diffusers.DiffusionPipeline:
    """Load the pipeline of a folder, or of a name on the Hugging Face hub, all of it in `dtype`."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        # diffusers is about to rename the argument; older ones know no other name.
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")
        pipe = diffusers.DiffusionPipeline.from_pretrained(model, torch_dtype=dtype)
    return pipe.to(device)
