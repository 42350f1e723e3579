"""Flags of the verbs that make a model write: which one, how it is loaded, how it samples."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from nautile.core.log import log, warn
from nautile.infer.params import SamplingParams

if TYPE_CHECKING:
    from nautile.infer.llm import LLM

HALVES = {"bfloat16": "bf16", "float16": "fp16"}
"""Types of 16 bits in config.json → what --dtype calls them."""
LARGE = 4e9
"""Bytes from which a model's size in float32 is worth a word."""


@dataclass(frozen=True)
class ModelArgs:
    """A model, and how it samples. Where a flag is not given, the model's generation_config.json decides."""

    model: tyro.conf.Positional[str]
    """A model folder, a run folder, or a model of the Hugging Face Hub."""
    max_tokens: int | None = None
    """Most tokens to generate."""
    temperature: float | None = None
    """0 takes the most likely token; higher is more varied."""
    top_p: float | None = None
    """Sample from the most likely tokens whose probabilities sum to this; 1 for all."""
    top_k: int | None = None
    """Sample from so many most likely tokens; 0 for all."""
    seed: int | None = None
    """Seed of the sampling; without one, every run differs."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A string that ends the text; may be given several times."""
    dtype: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    """Type of the weights; auto is the one that config.json names."""
    device: str = "cpu"
    """Where the model runs: cpu, cuda, cuda:1, ..."""
    allow_pickle: bool = False
    """Read pickled pytorch_model.bin files where there are no safetensors; tensors only."""

    def check(self) -> None:
        """Refuse impossible values before a model is loaded."""
        given = {name: value for name, value in self.sampling.items() if value is not None}
        SamplingParams(stop=self.stop, **given)  # type: ignore[arg-type]

    @property
    def sampling(self) -> dict[str, float | None]:
        """The flags of sampling by their names in `SamplingParams`."""
        return {name: getattr(self, name) for name in ("max_tokens", "temperature", "top_p", "top_k")}


def open_llm(args: ModelArgs, chat_template: str | None = None) -> "LLM":
    """Load the model that the flags name; `chat_template` forces a built-in template."""
    from nautile.infer.llm import LLM
    from nautile.models.io import model_folder
    from nautile.models.placement import torch_device
    from nautile.ops.dispatch import summary

    device = torch_device(args.device)  # refused before anything is downloaded
    folder = model_folder(args.model, args.allow_pickle)
    if args.dtype == "fp32":
        _tell_of_half_the_memory(folder, args.allow_pickle)
    llm = LLM(folder, args.dtype, device=device, chat_template=chat_template, allow_pickle=args.allow_pickle)
    first = next(llm.model.parameters())
    log(summary(first.device, first.dtype))
    return llm


def sampling_params(args: ModelArgs, llm: "LLM", max_tokens: int, ignore_eos: bool = False) -> SamplingParams:
    """What the flags and then `LLM.sampling` say; tells on stderr what came of it.

    Args:
        args: The flags.
        llm: The model.
        max_tokens: Where nobody says how long an answer may be.
        ignore_eos: Go on after the end of a text.
    """
    values, told = llm.sampling(args.sampling, max_tokens)
    log(told)
    if llm.defaults.not_applied:
        ignored = ", ".join(f"{name} {value}" for name, value in llm.defaults.not_applied.items())
        warn(f"{llm.defaults.source} also asks for {ignored}, which is not applied")
    return SamplingParams(seed=args.seed, stop=args.stop, ignore_eos=ignore_eos, **values)  # type: ignore[arg-type]


def _tell_of_half_the_memory(folder: Path, allow_pickle: bool) -> None:
    """Say what float32 costs where the weights are published in 16 bits and their number makes it matter."""
    from nautile.checkpoint.index import weight_files
    from nautile.models.family import read_published

    published = read_published(folder)
    said = str(published.get("torch_dtype") or published.get("dtype"))
    if said not in HALVES or published.get("quantization_config"):
        return
    size = sum(file.stat().st_size for file in weight_files(folder, allow_pickle).paths)
    if 2 * size > LARGE:
        log(
            f"the weights take {2 * size / 1e9:.1f} GB as float32; --dtype {HALVES[said]}, as they are published, "
            f"takes {size / 1e9:.1f} GB"
        )
