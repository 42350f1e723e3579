"""Every source of randomness in one place: seeding them, and saving and restoring where they stand.

The state is a flat dict of tensors, so that it fits into a safetensors checkpoint beside the optimiser.
"""

import random

import numpy as np
import torch
from torch import Tensor


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (all devices) with one number."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # numpy's global generator takes 32 bits
    torch.manual_seed(seed)


def rng_state() -> dict[str, Tensor]:
    """Where all global generators stand: name → tensor, as `set_rng_state` reads it."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python.words": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy.keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy.position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy.gauss": torch.tensor([cached], dtype=torch.float64),
    }
    for device in range(torch.cuda.device_count()):
        state[f"cuda.{device}"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Put all global generators where `rng_state` found them; devices that are no longer there are skipped."""
    torch.set_rng_state(state["torch"])
    gauss = state["python.gauss"].tolist()
    random.setstate((3, tuple(state["python.words"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = state["numpy.position"].tolist()
    keys = state["numpy.keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, state["numpy.gauss"].item()))
    for device in range(torch.cuda.device_count()):
        if f"cuda.{device}" in state:
            torch.cuda.set_rng_state(state[f"cuda.{device}"], device)
