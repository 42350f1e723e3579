"""What a model needs against what a folder holds: names, shapes and dtypes, from headers alone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nautile.checkpoint.layout import Layout
from nautile.checkpoint.source import Checkpoint

_READ_AS_FLOAT = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn}


@dataclass(frozen=True)
class Comparison:
    """How a folder's tensors differ from those that a model needs. Each list holds one line per tensor."""

    missing: list[str] = field(default_factory=list)
    """Published names that the model needs and the folder lacks."""
    unexpected: list[str] = field(default_factory=list)
    """Published names in the folder that belong nowhere."""
    wrong_shape: list[str] = field(default_factory=list)
    wrong_dtype: list[str] = field(default_factory=list)
    """Tensors that are not numbers of the kind needed: integers, or FP8 whose scales do not fit."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Published names that are not read on purpose, and why."""

    @property
    def fits(self) -> bool:
        """Whether the folder fills the model exactly."""
        return not (self.missing or self.unexpected or self.wrong_shape or self.wrong_dtype)

    def report(self, most: int | None = 5) -> str:
        """The lists as text, each with its title and at most `most` lines; empty when everything fits."""
        lists = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "wrong shape": self.wrong_shape,
            "wrong dtype": self.wrong_dtype,
        }
        return "\n".join(line for title, lines in lists.items() for line in _listed(title, lines, most))


def compare(model: nn.Module, checkpoint: Checkpoint, layout: Layout) -> Comparison:
    """Differences between what `model` needs and what `checkpoint` holds; no tensor is read.

    Args:
        model: May be on the meta device.
        checkpoint: An open folder.
        layout: Where the model's parameters lie in such folders.
    """
    needed = targets(model, layout)
    held, tied = checkpoint.weight_names(), tied_names(model)
    dropped = {name: reason for name in held if (reason := _drop_reason(name, needed, layout, tied))}
    both = [name for name in needed if name in checkpoint.infos]
    return Comparison(
        missing=sorted(name for name in needed if name not in checkpoint.infos),
        unexpected=sorted(name for name in held if name not in needed and name not in dropped),
        wrong_shape=_problems(both, lambda name: _shape_problem(name, needed[name], checkpoint)),
        wrong_dtype=_problems(both, lambda name: _dtype_problem(name, needed[name], checkpoint)),
        dropped=dropped,
    )


def targets(model: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """Published name → the view of our parameter or buffer that it fills. Tied parameters come once."""
    found = {}
    for name, tensor in named_tensors(model):
        for piece in layout.pieces(name, tensor):
            found[piece.published] = tensor.detach()[piece.place] if piece.place else tensor.detach()
    return found


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Everything of a model that is stored: its parameters and buffers."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def tied_names(model: nn.Module) -> set[str]:
    """Names that some files of a tied model hold though the parameter is another one again."""
    once = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - once


def _drop_reason(name: str, needed: dict[str, Tensor], layout: Layout, tied: set[str]) -> str | None:
    if name in needed:
        return None
    return "tied to the embedding" if name in tied else layout.drop_reason(name)


def _problems(names: list[str], problem: Callable[[str], str | None]) -> list[str]:
    return sorted(found for name in names if (found := problem(name)))


def _shape_problem(name: str, target: Tensor, checkpoint: Checkpoint) -> str | None:
    shape = checkpoint.infos[name].shape
    return None if shape == target.shape else f"{name} is {list(shape)}, not {list(target.shape)}"


def _dtype_problem(name: str, target: Tensor, checkpoint: Checkpoint) -> str | None:
    if problem := checkpoint.quantization_problem(name):
        return problem
    dtype = checkpoint.infos[name].dtype
    # Any floating dtype is converted to the one wanted: norms are published as BF16 and as F32.
    if dtype == target.dtype or (target.dtype.is_floating_point and dtype in _READ_AS_FLOAT):
        return None
    return f"{name} is {str(dtype).removeprefix('torch.')}, not a floating dtype that can be read"


def _listed(title: str, lines: list[str], most: int | None) -> list[str]:
    if not lines:
        return []
    shown = lines if most is None else lines[:most]
    more = [f"    … and {len(lines) - len(shown)} more"] if len(lines) > len(shown) else []
    return [f"  {title}:", *(f"    {line}" for line in shown), *more]
