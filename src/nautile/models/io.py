"""Models in and out of Hugging Face folders: the public `nautile.load` and `nautile.save`."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from nautile.checkpoint.folder import load_into, locate, save_from
from nautile.core.errors import UserError
from nautile.core.log import warn
from nautile.core.nearest import suggestion
from nautile.models import FAMILIES
from nautile.models.deepseek_v3.checkpoint import layout
from nautile.models.deepseek_v3.config import DeepseekV3Config
from nautile.models.deepseek_v3.model import DeepseekV3ForCausalLM


def load_model(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> DeepseekV3ForCausalLM:
    """Model of a folder with config.json and safetensors, or of a run folder (its `model/`). In eval mode.

    Args:
        path: The folder.
        dtype: Weights are converted to it; None keeps float32. Correction biases stay float32 always.
        device: Where the weights go.

    Raises:
        UserError: No such folder, an unknown family, or weights that do not fit config.json.
    """
    folder = model_folder(path)
    config = without_absent_mtp(read_config(folder), folder)
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty_like(parameter, dtype=dtype or torch.float32, device=device)
            setattr(module, name, nn.Parameter(empty))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    load_into(model, folder, layout(config))
    return model.eval()


def save_model(model: DeepseekV3ForCausalLM, folder: str | Path) -> None:
    """Write config.json and safetensors in the published layout, which transformers and vLLM read.

    Raises:
        NautileError: The disk is full or not writable.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    save_from(model, folder, layout(model.config))
    config = {**model.config.to_hf(), "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


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


def read_config(folder: Path) -> DeepseekV3Config:
    """Configuration of a model folder.

    Raises:
        UserError: The file is not JSON, names an unknown family, or belongs to quantised weights.
    """
    try:
        published = json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise UserError(
            f"{folder / 'config.json'}:{error.lineno}: not JSON ({error.msg})",
            "the model's shape is read from it",
            "copy the file again",
        ) from error
    family = published.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"{folder / 'config.json'}: model_type {family!r} is not supported",
            f"nautile knows {', '.join(FAMILIES)}",
            suggestion(str(family), FAMILIES, "supported families"),
        )
    if quantised := published.get("quantization_config"):
        raise UserError(
            f"{folder}: the weights are quantised with {quantised.get('quant_method', 'an unknown method')}",
            "nautile reads float32, float16 and bfloat16 weights; block scales are not applied yet",
            "name a folder of bfloat16 weights without quantization_config, as after the official fp8_cast_bf16.py",
        )
    return DeepseekV3Config.from_hf(published)


def without_absent_mtp(config: DeepseekV3Config, folder: Path) -> DeepseekV3Config:
    """The configuration that the weights can fill: files saved by transformers promise MTP modules they do not hold."""
    if config.num_nextn_predict_layers == 0:
        return config
    prefix = f"model.layers.{config.num_hidden_layers}."
    if any(name.startswith(prefix) for name in locate(folder)):
        return config
    promised = config.num_nextn_predict_layers
    warn(f"{folder}: config.json says {promised} MTP module(s), the weights hold none; loading without")
    return replace(config, num_nextn_predict_layers=0)
