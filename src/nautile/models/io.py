"""Models in and out of Hugging Face folders: the public `nautile.load` and `nautile.save`."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nautile.checkpoint.folder import load_into, locate, save_from
from nautile.core.atomic import atomic_write_text
from nautile.core.errors import UserError
from nautile.core.log import warn
from nautile.models.causal_lm import CausalLM
from nautile.models.config import DecoderConfig, MultiTokenPrediction
from nautile.models.family import build_model, layout_of, read_config


def load_model(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    experts: range | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> CausalLM:
    """Model of a folder with config.json and safetensors, or of a run folder (its `model/`). In eval mode.

    Args:
        path: The folder.
        dtype: Weights are converted to it; None keeps float32. Correction biases stay float32 always.
        device: Where the weights go.
        experts: The routed experts of every layer that this process holds; None for all. Such a model needs a
            `Dispatcher` that sends tokens to the others.
        overrides: Fields of config.json to replace, such as ``{"index_topk": 512}``.

    Raises:
        UserError: No such folder, an unknown family, or weights that do not fit config.json.
    """
    folder = model_folder(path)
    config = without_absent_mtp(read_config(folder, overrides), folder)
    with torch.device("meta"):
        model = build_model(config, experts)
    allocate(model, dtype or torch.float32, device)
    load_into(model, folder, layout_of(config, experts))
    return model.eval()


def allocate(model: CausalLM, dtype: torch.dtype, device: str | torch.device) -> None:
    """Give a model built on the meta device memory, uninitialised, in place.

    Parameters get `dtype`, but those marked ``keep_float32`` stay float32, as do all buffers.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            wide = getattr(parameter, "keep_float32", False)
            empty = nn.Parameter(torch.empty_like(parameter, dtype=torch.float32 if wide else dtype, device=device))
            setattr(empty, "keep_float32", wide)  # noqa: B010 (an attribute of ours on torch's class)
            setattr(module, name, empty)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def save_model(model: CausalLM, folder: str | Path) -> None:
    """Write config.json and safetensors in the published layout, which transformers and vLLM read.

    Raises:
        NautileError: The disk is full or not writable.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    save_from(model, folder, layout_of(model.config))
    config = {**model.config.to_hf(), "torch_dtype": dtype}
    atomic_write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def model_folder(path: str | Path) -> Path:
    """The folder that holds config.json: `path` itself, or `model/` in it.

    Raises:
        UserError: There is none.
    """
    path = Path(path)
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(
        f"{path}: no config.json there" if path.exists() else f"{path}: no such folder",
        "a model is a folder with config.json and safetensors, or a finished run",
        "name one, such as runs/demo, or make one: nautile demo",
    )


def without_absent_mtp(config: DecoderConfig, folder: Path) -> DecoderConfig:
    """The configuration that the weights can fill: files saved by transformers promise MTP modules they do not hold."""
    if not isinstance(config, MultiTokenPrediction) or config.num_nextn_predict_layers == 0:
        return config
    prefix = f"model.layers.{config.num_hidden_layers}."
    if any(name.startswith(prefix) for name in locate(folder)):
        return config
    promised = config.num_nextn_predict_layers
    warn(f"{folder}: config.json says {promised} MTP module(s), the weights hold none; loading without")
    return replace(config, num_nextn_predict_layers=0)
