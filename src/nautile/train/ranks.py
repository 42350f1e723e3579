"""How many processes train together: one, today."""

import os

from nautile.core.errors import UserError


def world_size() -> int:
    """Ranks of this launch, as torchrun announces them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def one_rank_only() -> None:
    """Raise `UserError` under a launcher of several ranks."""
    if world_size() > 1:
        raise UserError(
            f"WORLD_SIZE is {world_size()}",
            "pre-training runs on one rank today; several would each train their own model",
            "launch it without torchrun",
        )
