"""Models in and out of Hugging Face folders: the public `nautile.load` and `nautile.save`."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nautile.checkpoint.allocate import allocate, meta_device
from nautile.checkpoint.hub import remote_name, resolve
from nautile.checkpoint.load import check_fit, fill
from nautile.checkpoint.save import save_from
from nautile.checkpoint.source import Checkpoint, open_checkpoint, quantization_of
from nautile.core.errors import UserError
from nautile.core.log import warn
from nautile.models.causal_lm import CausalLM
from nautile.models.config import DecoderConfig, MultiTokenPrediction
from nautile.models.family import build_model, layout_of, read_config, read_published
from nautile.models.placement import torch_device, torch_dtype


def load_model(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    *,
    allow_pickle: bool = False,
    experts: range | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> CausalLM:
    """Model of a folder with config.json and safetensors, of a run folder (its `model/`), or of the Hub. In eval mode.

    Args:
        path: The folder, or ``organisation/name`` (``@revision`` may follow), which is downloaded first.
        dtype: Weights are converted to it: a type, its name ("bf16", "float32", ...), or "auto" for the one that
            config.json names; None keeps float32. Correction biases stay float32 always.
        device: Where the weights go.
        allow_pickle: Take pickled ``pytorch_model.bin`` files where there are no safetensors; tensors only.
        experts: The routed experts of every layer that this process holds; None for all. Such a model needs a
            `Dispatcher` that sends tokens to the others.
        overrides: Fields of config.json to replace, such as ``{"index_topk": 512}``.

    Raises:
        UserError: No such folder, type or device, an unknown family, or weights that do not fit config.json.
    """
    device = torch_device(device)
    if experts is not None and not isinstance(experts, range):
        raise UserError(
            f"experts {experts!r:.80} is no range",
            "a process holds neighbouring experts, so that tokens find them by their number",
            "give a range, such as experts=range(0, 64)",
        )
    folder = model_folder(path, allow_pickle)
    config = read_config(folder, overrides)
    dtype = torch_dtype(dtype, read_published(folder))
    with open_checkpoint(folder, allow_pickle) as checkpoint:
        config = without_absent_mtp(config, checkpoint)
        with meta_device():
            model = build_model(config, experts)
        layout = layout_of(config, experts)
        check_fit(model, checkpoint, layout)
        allocate(model, dtype, device)
        fill(model, checkpoint, layout)
    return model.eval()


def save_model(model: CausalLM, folder: str | Path) -> None:
    """Write config.json and safetensors in the published layout, which transformers and vLLM read.

    An earlier model in the folder is replaced. A process that is killed leaves the earlier one, the new one, or, if it
    was killed between the renames of weights and config.json, a folder without config.json, which loading refuses.

    Raises:
        UserError: The model holds only a part of its experts.
        NautileError: The disk is full or not writable.
    """
    _refuse_a_slice(model)
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    config = {**model.config.to_hf(), "torch_dtype": dtype}
    save_from(model, Path(folder), layout_of(model.config), config=json.dumps(config, indent=2) + "\n")


def _refuse_a_slice(model: CausalLM) -> None:
    experts = getattr(model.config, "n_routed_experts", 0)
    for held in {len(parameter) for parameter in model.expert_parameters()} - {experts}:
        raise UserError(
            f"the model holds {held} of {experts} routed experts",
            "a folder without the others would look whole and be another model",
            "gather the experts of all processes first, or save a model that was loaded without experts=",
        )


def model_folder(path: str | Path, allow_pickle: bool = False) -> Path:
    """The local folder that holds config.json: `path` itself, `model/` in it, or where a Hub id was downloaded to.

    Of a Hub id, config.json is fetched and read first: of a model that cannot be built, no weight is downloaded.

    Raises:
        UserError: There is none, here or on the Hub, or the Hub's is of another family or quantisation.
    """
    if remote_name(path) and not Path(path).exists():  # told before 700 GB are fetched, not after
        said = resolve(path, weights=False)
        if (said / "config.json").is_file():
            read_config(said)
            quantization_of(said / "config.json")
    found = resolve(path, allow_pickle=allow_pickle)
    for folder in (found, found / "model"):
        if (folder / "config.json").is_file():
            return folder
    if any(found.glob("*.safetensors")):
        raise UserError(
            f"{path}: weights without a config.json",
            "saving over an earlier model was interrupted, or the file was not copied",
            "save the model again, or copy its config.json beside the weights",
        )
    raise UserError(
        f"{path}: no config.json there",
        "a model is a folder with config.json and safetensors, or a finished run",
        "name one, such as runs/demo, or make one: nautile demo",
    )


def without_absent_mtp(config: DecoderConfig, checkpoint: Checkpoint) -> DecoderConfig:
    """The configuration that the weights can fill: files saved by transformers promise MTP modules they do not hold."""
    if not isinstance(config, MultiTokenPrediction) or config.num_nextn_predict_layers == 0:
        return config
    prefix = f"model.layers.{config.num_hidden_layers}."
    if any(name.startswith(prefix) for name in checkpoint.infos):
        return config
    promised = config.num_nextn_predict_layers
    warn(f"{checkpoint.folder}: config.json says {promised} MTP module(s), the weights hold none; loading without")
    return replace(config, num_nextn_predict_layers=0)
