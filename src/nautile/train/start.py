"""Weights of a finished model as the start of a run, where a recipe asks for it.

A V3.2 model may start from a V3 of the same shape, as the published one did from V3.1: only its indexers are new.
"""

from nautile.core.errors import UserError
from nautile.core.log import log
from nautile.models.causal_lm import CausalLM
from nautile.models.io import load_model

NEW = ".indexer."
"""Part of the names of tensors that a run may add to the model it starts from."""


def start_from_(model: CausalLM, folder: str) -> None:
    """Copy the model in `folder` into `model`; indexers that it lacks keep their initial weights.

    Raises:
        UserError: There is no model, or its tensors are not those of the recipe's model.
    """
    found = load_model(folder).state_dict()
    own = model.state_dict()
    added = {name for name in own.keys() - found.keys() if NEW in name}
    odd = sorted((own.keys() - found.keys() - added) | (found.keys() - own.keys()))
    odd += [name for name in sorted(own.keys() & found.keys()) if own[name].shape != found[name].shape]
    if odd:
        shapes = [list(tensors[odd[0]].shape) if odd[0] in tensors else "absent" for tensors in (own, found)]
        raise UserError(
            f"start: {folder} does not fit the recipe's model: {odd[0]} is {shapes[0]} here and {shapes[1]} there",
            "a run continues the weights it starts from, so that the shapes must be the same",
            f"give the section model the values of {folder}'s config.json",
        )
    model.load_state_dict(found, strict=False)
    log(f"starting from {folder}" + (f" with {len(added)} new tensors of indexers" if added else ""))
