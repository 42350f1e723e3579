"""What a logged step records: losses, load of the experts, speed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nautile.models.accounting.flops import mtp_train_flops, train_flops
from nautile.models.accounting.shape import shape_from_config
from nautile.models.config import MultiTokenPrediction
from nautile.train.losses import Losses
from nautile.train.schedule import StepSettings


@dataclass
class Speed:
    """Tokens and seconds of training steps since the last reading; validation and checkpoints do not count."""

    flops_per_token: float
    tokens: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Count one step."""
        self.tokens += tokens
        self.seconds += seconds

    def read(self) -> dict[str, float]:
        """Tokens per second and GFLOP/s of the steps since the last reading."""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        self.tokens, self.seconds = 0, 0.0
        return {"tokens_per_second": rate, "gflops": rate * self.flops_per_token / 1e9}


def training_flops_per_token(model: MultiTokenPrediction, sequence_length: int) -> float:
    """Forward and backward, MTP modules included: the model's own arithmetic, without what an implementation adds."""
    shape = shape_from_config(model.to_hf())
    return train_flops(shape, sequence_length).all + mtp_train_flops(shape, sequence_length).all


def load_imbalance(counts_E: Tensor) -> float:
    """Busiest expert's tokens over the mean; 1 is perfect balance, E / K the worst."""
    return (counts_E.max() / counts_E.double().mean()).item()


def measurements(
    losses: Losses,
    grad_norm: Tensor,
    index_grad_norm: Tensor | None,
    settings: StepSettings,
    speed: dict[str, float],
) -> dict[str, Any]:
    """What metrics.jsonl says about a step. `losses` are those of its whole batch; norms are those before clipping."""
    index = {}
    if settings.index_stage is not None and index_grad_norm is not None:
        index = {
            "index_loss": losses.index.item(),
            "index_grad_norm": index_grad_norm.item(),
            "index_stage": settings.index_stage,
        }
    return {
        "loss": losses.main.item(),
        "mtp_loss": losses.mtp.tolist(),
        "balance_loss": losses.balance.item(),
        **index,
        "grad_norm": grad_norm.item(),
        "lr": settings.lr,
        "mtp_weight": settings.mtp_weight,
        "bias_speed": settings.bias_speed,
        "load_max_over_mean": [load_imbalance(counts_E) for counts_E in losses.counts],
        "expert_counts": [counts_E.tolist() for counts_E in losses.counts],
        **speed,
    }


def log_line(line: dict[str, Any]) -> str:
    """The record as a person reads it."""
    parts = [f"loss {line['loss']:.4f}"]
    parts += [f"mtp {loss:.4f}" for loss in line["mtp_loss"]]
    if line.get("index_stage", "dense") != "dense":
        parts.append(f"index {line['index_loss']:.4f}")
    parts += [f"lr {line['lr']:.2e}", f"{line['tokens_per_second']:,.0f} tok/s"]
    if load := line["load_max_over_mean"]:
        parts.append(f"load max/mean {sum(load) / len(load):.2f}")
    return "  ".join(parts)


def merge(losses: Sequence[Losses]) -> Losses:
    """Losses of a whole step from those of its micro-batches: means of the losses, sums of the counts."""

    def mean(name: str) -> Tensor:
        return torch.stack([getattr(part, name).detach() for part in losses]).mean(0)

    counts = tuple(torch.stack(per_router).sum(0) for per_router in zip(*(part.counts for part in losses), strict=True))
    means = {name: mean(name) for name in ("total", "main", "mtp", "balance", "index")}
    return Losses(**means, counts=counts)
