"""What a conversion is asked to do, and which wishes contradict each other."""

from dataclasses import dataclass
from typing import Literal

from nautile.core.errors import UserError

Dtype = Literal["bf16", "fp16", "fp32", "fp8"]
Form = Literal["huggingface", "deepseek-demo"]
ScaleFormat = Literal["float32", "ue8m0"]


@dataclass(frozen=True)
class Options:
    """One conversion.

    Raises:
        UserError: Its parts contradict each other.
    """

    dtype: Dtype | None = None
    """Dtype of the weights; None keeps the stored ones, which only ``deepseek-demo`` can mean."""
    scale_format: ScaleFormat | None = None
    """Scales of FP8 weights: any float32 (V3, the default), or powers of two (V3.2)."""
    to: Form = "huggingface"
    """A folder as it is published, or the files of DeepSeek's inference demo."""
    model_parallel: int = 1
    """Processes that the demo's files are cut for."""
    allow_pickle: bool = False
    """Read pickled ``.bin`` weights, too."""

    def __post_init__(self) -> None:
        demo = self.to == "deepseek-demo"
        if self.dtype is None and not demo:
            raise UserError(
                "nothing to convert to", "neither --dtype nor --to deepseek-demo was given", "--dtype bf16, or --help"
            )
        if demo and self.dtype in ("fp16", "fp32"):
            raise UserError(
                f"--to deepseek-demo with --dtype {self.dtype}",
                "DeepSeek's demo computes in bf16 or fp8 only",
                "--dtype bf16 or --dtype fp8, or leave --dtype out to keep the stored weights",
            )
        if self.scale_format is not None and self.dtype != "fp8":
            raise UserError(
                f"--scale-format {self.scale_format} without --dtype fp8",
                "only FP8 weights have scales",
                "add --dtype fp8, or leave --scale-format out",
            )
        if self.model_parallel != 1 and not demo:
            raise UserError(
                f"--model-parallel {self.model_parallel} without --to deepseek-demo",
                "only the demo's files are cut for several processes",
                "add --to deepseek-demo, or leave --model-parallel out",
            )
        if self.model_parallel < 1:
            raise UserError(
                f"--model-parallel {self.model_parallel} is not possible", "it counts processes", "1 or more"
            )
