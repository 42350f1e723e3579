"""The state of a run on disk: safetensors and JSON, nothing that executes when read.

checkpoints/step-000400/
    model.safetensors      parameters and buffers (the router biases) under the names of the module tree
    optimizer.safetensors  PARAMETER.exp_avg, PARAMETER.exp_avg_sq, PARAMETER.step
    rng.safetensors        the global random generators
    state.json             step, tokens, seconds, position of the loader, what the run belongs to

A folder of that name is complete: it is written under another name and renamed. A kill at any moment therefore leaves
the newest complete checkpoint to resume from.
"""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nautile.core.errors import NautileError, UserError
from nautile.core.run_folder import RunFolder, atomic_folder
from nautile.core.seed import rng_state, set_rng_state
from nautile.train.ranks import world_size
from nautile.train.state import TrainState

_COMPLETE = re.compile(r"step-(\d{6,})")
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def checkpoints(run: RunFolder) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in run.checkpoints.glob("step-*") if _COMPLETE.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def save_checkpoint(run: RunFolder, state: TrainState, data_fingerprint: str, keep: int) -> Path:
    """Write the state, then remove all but the newest `keep` checkpoints.

    Raises:
        NautileError: the disk is full or not writable; earlier checkpoints are intact.
    """
    folder = run.checkpoints / f"step-{state.step:06d}"
    if folder.exists():
        return folder
    about = {
        "step": state.step,
        "tokens": state.tokens,
        "seconds": state.seconds,
        "loader": state.loader.state(),
        "data_fingerprint": data_fingerprint,
        "world_size": world_size(),
    }
    try:
        with atomic_folder(folder) as partial:
            _save(model_tensors(state.model), partial / "model.safetensors")
            _save(_optimizer_tensors(state), partial / "optimizer.safetensors")
            _save(rng_state(), partial / "rng.safetensors")
            (partial / "state.json").write_text(json.dumps(about, indent=2) + "\n")
    except NautileError as error:
        raise _not_written(run, folder, error) from error
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return folder


def load_checkpoint(folder: Path, state: TrainState, data_fingerprint: str) -> None:
    """Put a new state, built from the same recipe, where the checkpoint left off.

    Raises:
        UserError: the checkpoint was written by another number of ranks or on other data.
        NautileError: its tensors are not those of this model.
    """
    about = json.loads((folder / "state.json").read_text())
    _check_belongs(folder, about, data_fingerprint)
    _restore_model(folder, state.model)
    _restore_optimizer(folder, state)
    set_rng_state(load_file(folder / "rng.safetensors"))
    state.loader.restore(about["loader"])
    state.step, state.tokens, state.seconds = about["step"], about["tokens"], about["seconds"]


def remove_leftovers(run: RunFolder) -> None:
    """Delete half-written checkpoints of killed processes: they can be as large as the whole ones."""
    for partial in run.checkpoints.glob(".step-*"):
        shutil.rmtree(partial)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a tied weight appears once."""
    saved = model.state_dict().keys()
    named = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in saved}
    return {name: tensor.detach() for name, tensor in named.items()}


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    return {
        f"{name}.{moment}": state.optimizer.state[parameter][moment]
        for name, parameter in state.model.named_parameters()
        for moment in _MOMENTS
        if parameter in state.optimizer.state  # empty before the first step
    }


@torch.no_grad()
def _restore_model(folder: Path, model: nn.Module) -> None:
    stored, own = load_file(folder / "model.safetensors"), model_tensors(model)
    if odd := sorted(stored.keys() ^ own.keys()):
        raise NautileError(
            f"{folder} does not fit the recipe's model: {odd[0]} is in only one of the two",
            "the checkpoint was written by another version of the model code",
            "resume with the version recorded in env.json",
        )
    for name, tensor in own.items():
        tensor.copy_(stored[name])


def _restore_optimizer(folder: Path, state: TrainState) -> None:
    stored = load_file(folder / "optimizer.safetensors")
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    whole = state.optimizer.state_dict()
    ordered = [names[p] for group in state.optimizer.param_groups for p in group["params"]]
    whole["state"] = {
        index: {moment: stored[f"{name}.{moment}"] for moment in _MOMENTS}
        for index, name in enumerate(ordered)
        if f"{name}.step" in stored
    }
    state.optimizer.load_state_dict(whole)


def _check_belongs(folder: Path, about: dict, data_fingerprint: str) -> None:
    if about["world_size"] != world_size():
        raise UserError(
            f"{folder} was written by {about['world_size']} ranks, this launch has {world_size()}",
            "the loader's position and the weights would fit, the order of the sums of gradients would not, "
            "so the run would not continue exactly",
            f"resume with {about['world_size']} ranks",
        )
    if about["data_fingerprint"] != data_fingerprint:
        raise UserError(
            f"{folder} was trained on data {about['data_fingerprint']}, the recipe now gives {data_fingerprint}",
            "the corpus, its tokenizer or the tokenizers library has changed, so the loader's position means nothing",
            "restore the earlier files or version, or start a new run with --out",
        )


def _not_written(run: RunFolder, folder: Path, error: NautileError) -> NautileError:
    intact = checkpoints(run)
    kept = f"{intact[-1].name} is intact" if intact else "there is no earlier one"
    return NautileError(
        f"checkpoint {folder.name} could not be written ({error.what})",
        f"{error.why}; {kept}",
        f"free some space, then: nautile pretrain --resume {run.path}",
    )
