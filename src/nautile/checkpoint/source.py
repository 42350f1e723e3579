"""A published folder's tensors, over all its files: `open_checkpoint` refuses what is not whole, `Checkpoint` reads.

Rows of a tensor, and FP8 weights as the numbers they stand for, are read without holding the whole tensor twice.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from nautile.checkpoint.casts import check_range
from nautile.checkpoint.fp8 import LARGEST, SCALE, Fp8Format, dequantize, read_quantization, scale_shape
from nautile.checkpoint.header import TensorInfo
from nautile.checkpoint.index import SAFETENSORS, check_index, weight_files
from nautile.checkpoint.pickled import PickledReader
from nautile.checkpoint.shard import ShardReader
from nautile.core.errors import UserError
from nautile.core.json_file import read_json_object

_TILE = 1 << 18
"""Elements that are dequantised at a time: their float32 values fit a core's second-level cache."""


class Reader(Protocol):
    """One open file of weights: a `ShardReader`, or a pickled file's stand-in."""

    path: Path
    tensors: dict[str, TensorInfo]

    def read(self, name: str, out: Tensor | None = None) -> Tensor: ...
    def read_rows(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor: ...
    def close(self) -> None: ...


class Checkpoint:
    """Tensors of an open folder. Reading is safe from several threads at once.

    Args:
        folder: Where config.json and the files are.
        readers: Every file, opened. No two of them hold a tensor of the same name.
        quantization: How the FP8 weights among them are to be read.
    """

    def __init__(self, folder: Path, readers: Sequence[Reader], quantization: Fp8Format | None = None) -> None:
        self.folder = folder
        self.quantization = quantization
        self.infos: dict[str, TensorInfo] = {n: info for reader in readers for n, info in reader.tensors.items()}
        self.files: dict[str, Path] = {name: reader.path for reader in readers for name in reader.tensors}
        self._readers = readers
        self._reader = {name: reader for reader in readers for name in reader.tensors}

    def weight_names(self) -> list[str]:
        """All tensors but the scales of quantised weights, in the files' order."""
        return [name for name in self.infos if not self.is_scale(name)]

    def is_scale(self, name: str) -> bool:
        """Whether the tensor `name` holds the block scales of another one."""
        return name.endswith(SCALE) and name.removesuffix(SCALE) in self.infos

    def stored(self, name: str, out: Tensor | None = None, rows: slice | None = None) -> Tensor:
        """The tensor as it is in the file, or `out` filled with it (converted to its dtype); only `rows`, if given."""
        if rows is None:
            return self._reader[name].read(name, out)
        return self._reader[name].read_rows(name, rows.start, rows.stop, out)

    def weight(self, name: str, out: Tensor | None = None, rows: slice | None = None) -> Tensor:
        """The weight that `name` stands for: dequantised (float32) when it has block scales, otherwise as stored.

        Args:
            name: A published weight.
            out: Filled with the weight, converted to its dtype and device, and returned.
            rows: Rows of the weight (`TensorInfo.rows`), as ``slice(start, stop)``; None for all.

        Raises:
            UserError: The weight is FP8 without scales that fit it, or one of its numbers would become infinity in
                the dtype of `out`.
        """
        scales = self.scales(name)
        if scales is None:
            return self.stored(name, out, rows)
        assert self.quantization
        block = self.quantization.block
        info = self.infos[name]
        start, stop = (0, info.shape[0]) if rows is None else (rows.start, rows.stop)
        if out is None:
            out = torch.empty(stop - start, *info.shape[1:])
        step = max(1, _TILE // max(1, info.shape[1]))
        ample = (
            not scales.numel() or scales.abs().amax() * LARGEST < torch.finfo(out.dtype).max
        )  # True without NaN only
        for at in range(start, stop, step):
            part = self._reader[name].read_rows(name, at, min(at + step, stop))
            into, numbers = out.detach()[at - start :][: len(part)], dequantize(part, scales, block, at)
            into.copy_(numbers)
            if not ample:
                exact = part.double() * _spread(scales, block, slice(at, at + len(part)), part.shape[1])
                check_range(into, exact, f"{self.files[name]}: {name}")
        return out

    def scales(self, name: str) -> Tensor | None:
        """Block scales of the weight `name`, float32 [r, c]; None when it is not quantised.

        Raises:
            UserError: It is FP8 without scales, or its scales do not fit it.
        """
        problem = self.quantization_problem(name)
        if problem:
            raise UserError(
                f"{self.files[name]}: {problem}",
                "the weight cannot be told from its 8 bits alone",
                "check that config.json and the weights belong together, or copy them again",
            )
        if name + SCALE not in self.infos:
            return None
        return self.stored(name + SCALE, torch.empty(self.infos[name + SCALE].shape))

    def quantization_problem(self, name: str) -> str | None:
        """Why the weight `name` cannot be dequantised, from headers alone; None when it can, or need not."""
        info, scale = self.infos[name], self.infos.get(name + SCALE)
        if scale is None:
            if info.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
                return f"{name} is FP8 and has no {name.rpartition('.')[2]}{SCALE} beside it"
            return None
        if info.dtype != torch.float8_e4m3fn:
            return f"{name} has scales but is {_short(info.dtype)}, not float8_e4m3fn"
        if not scale.dtype.is_floating_point:
            return f"{name}{SCALE} is {_short(scale.dtype)}, not a floating dtype"
        if self.quantization is None:
            return f"{name} is FP8 with scales, config.json has no quantization_config that tells their block size"
        if len(info.shape) != 2:
            return f"{name} is FP8 with block scales but has shape {list(info.shape)}, not two dimensions"
        want = scale_shape(info.shape, self.quantization.block)
        if scale.shape != want:
            rows, columns = self.quantization.block
            return (
                f"{name}{SCALE} is {list(scale.shape)}, not {list(want)}: "
                f"{name} is {list(info.shape)} in blocks of {rows} × {columns}"
            )
        return None

    def close(self) -> None:
        """Give the files back."""
        for reader in self._readers:
            reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(folder: str | Path, allow_pickle: bool = False) -> Checkpoint:
    """The folder's weights, with every header read and checked and no tensor read.

    Args:
        folder: With config.json, and safetensors or pickled weights.
        allow_pickle: Take pickled weights where there are no safetensors. They are read by torch's restricted
            unpickler, which builds tensors and runs no code of the file; a mistake in it would be the risk.

    Raises:
        UserError: No weights there, one of the files is missing or damaged, the index contradicts the files, the
            quantisation is not supported, or the weights are pickled and `allow_pickle` is False.
    """
    folder = Path(folder)
    files = weight_files(folder, allow_pickle)
    quantization = quantization_of(folder / "config.json")
    open_file = ShardReader if files.kind is SAFETENSORS else PickledReader
    readers: list[Reader] = []
    try:
        for path in files.paths:
            readers.append(open_file(path))
        if files.weight_map:
            check_index(folder / files.kind.index, files.weight_map, {r.path.name: set(r.tensors) for r in readers})
    except BaseException:
        for reader in readers:
            reader.close()
        raise
    return Checkpoint(folder, readers, quantization)


def quantization_of(config: Path) -> Fp8Format | None:
    """How the weights beside a config.json are quantised; None when they are not, or there is no such file.

    Raises:
        UserError: It is not a JSON object, or the quantisation is not supported.
    """
    if not config.is_file():
        return None
    return read_quantization(read_json_object(config, "it says how the weights are stored"), str(config))


def _spread(scales: Tensor, block: tuple[int, int], rows: slice, columns: int) -> Tensor:
    """The scale of every number of some rows of a weight, float64."""
    return scales.double().repeat_interleave(block[0], 0)[rows].repeat_interleave(block[1], 1)[:, :columns]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
