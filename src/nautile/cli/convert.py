"""``nautile convert``: a checkpoint in another dtype, or cut for DeepSeek's inference demo."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from nautile.checkpoint.convert.options import Dtype, Form, Options, ScaleFormat
from nautile.cli.flags import parse
from nautile.core.log import log
from nautile.core.sizes import size_text

if TYPE_CHECKING:
    from nautile.checkpoint.convert.run import Summary

EXAMPLES = (
    "nautile convert DeepSeek-V3 DeepSeek-V3-bf16 --dtype bf16",
    "nautile convert DeepSeek-V3 DeepSeek-V3-demo --to deepseek-demo --model-parallel 16",
)


@dataclass(frozen=True)
class ConvertArgs:
    """What to convert, and into what."""

    source: tyro.conf.Positional[str]
    """A model folder, a run, or a Hugging Face Hub id."""
    destination: tyro.conf.Positional[str]
    """The folder to make. After an interruption, the same command goes on where it stopped."""
    dtype: Dtype | None = None
    """Dtype of the weights. fp8 is E4M3 with a scale per block of 128 × 128, as DeepSeek-V3 is published."""
    scale_format: ScaleFormat | None = None
    """Scales of fp8: any float32, as in V3 (the default), or powers of two, as in V3.2."""
    to: Form = "huggingface"
    """A folder as it is published, or the files of DeepSeek's inference demo (V2, V3, V3.2)."""
    model_parallel: int = 1
    """Processes that the demo's files are cut for."""
    allow_pickle: bool = False
    """Read pickled .bin weights where there are no safetensors. Only tensors are taken from them."""


def main(argv: Sequence[str]) -> int:
    """Convert, and say what was done."""
    description = "Convert a checkpoint tensor by tensor, without building the model."
    args = parse(ConvertArgs, None, argv, "nautile convert", description, EXAMPLES)
    options = Options(args.dtype, args.scale_format, args.to, args.model_parallel, args.allow_pickle)

    from nautile.checkpoint.convert.run import convert
    from nautile.checkpoint.hub import remote_name, resolve
    from nautile.checkpoint.source import quantization_of

    if remote_name(args.source) and not Path(args.source).exists():  # told before the weights are fetched
        quantization_of(resolve(args.source, weights=False) / "config.json")
    source = resolve(args.source, allow_pickle=args.allow_pickle)
    if not (source / "config.json").is_file() and (source / "model" / "config.json").is_file():
        source = source / "model"
    print_summary(convert(source, Path(args.destination), options))
    return 0


def print_summary(summary: "Summary") -> None:
    """The result on stdout; what it lacks on stderr."""
    new = summary.bytes_out - summary.bytes_resumed
    held = f"{_count(summary.tensors, 'tensor')} in {_count(summary.files, 'file')}"
    lines = [
        str(summary.destination),
        f"  {held}, read back from the disk and found right",
        f"  {size_text(summary.bytes_in)} in, {size_text(summary.bytes_out)} out",
        f"  {summary.seconds:.1f} s, {new / summary.seconds / 1e6:.0f} MB/s written",
    ]
    if summary.bytes_resumed:
        lines.append(f"  {size_text(summary.bytes_resumed)} of it were there from an earlier run")
    peak = _peak_bytes()
    if peak:
        lines.append(f"  {size_text(peak)} of memory at most")
    print("\n".join([*lines, *(f"  {note}" for note in summary.notes)]))
    if summary.left_out:
        log(f"not copied: {', '.join(summary.left_out)}")


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _peak_bytes() -> int | None:
    """Most memory that this process has held; None on Windows."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
