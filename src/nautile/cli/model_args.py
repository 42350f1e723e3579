"""Flags of the verbs that make a model write: which one, how it is loaded, how it samples."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from nautile.core.errors import UserError
from nautile.core.log import log, warn
from nautile.infer.defaults import Defaults, resolve
from nautile.infer.params import SamplingParams

if TYPE_CHECKING:
    import torch

    from nautile.infer.llm import LLM

NEUTRAL: Mapping[str, float] = {"temperature": 0.7, "top_p": 0.95}
"""Sampling of a model about which nobody says anything."""


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

    device = torch_device(args.device)
    folder = model_folder(args.model)
    return LLM(folder, torch_dtype(args.dtype, folder), device=device, chat_template=chat_template)


def sampling_params(
    args: ModelArgs, llm: "LLM", max_tokens: int, chat_template: str | None = None, ignore_eos: bool = False
) -> SamplingParams:
    """What the flags, the model's files, its publisher and we say, in this order; tells on stderr what came of it.

    Args:
        args: The flags.
        llm: The model.
        max_tokens: Where nobody says how long an answer may be.
        chat_template: The built-in template that was forced: its models' publisher is asked.
        ignore_eos: Go on after the end of a text.
    """
    sources = [llm.defaults, recommendation(llm, chat_template)]
    values, told = resolve(args.sampling, sources, {**NEUTRAL, "max_tokens": max_tokens})
    log(told)
    if llm.defaults.not_applied:
        ignored = ", ".join(f"{name} {value}" for name, value in llm.defaults.not_applied.items())
        warn(f"{llm.defaults.source} also asks for {ignored}, which is not applied")
    return SamplingParams(seed=args.seed, stop=args.stop, ignore_eos=ignore_eos, **values)  # type: ignore[arg-type]


def recommendation(llm: "LLM", chat_template: str | None = None) -> Defaults:
    """What the model's publisher says about sampling, as far as its folder tells which model it is."""
    from nautile.text.chat_template import format_of
    from nautile.text.templates.table import FORMATS

    name = chat_template
    if name is None and llm.folder is not None and llm.tokenizer is not None:
        name = format_of(llm.folder, llm.tokenizer).name
    if name is None:
        return Defaults()
    return Defaults(FORMATS[name].sampling, FORMATS[name].source)


def torch_dtype(name: str, folder: Path) -> "torch.dtype":
    """The type that a ``--dtype`` means for the model in `folder`.

    Raises:
        UserError: ``auto``, and config.json names a type that weights cannot have here.
    """
    import torch

    from nautile.models.family import read_published

    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name != "auto":
        return named[name]
    published = read_published(folder)
    said = str(published.get("torch_dtype") or published.get("dtype") or "float32")
    types = {str(dtype).removeprefix("torch."): dtype for dtype in named.values()}
    if said not in types:
        raise UserError(
            f"{folder / 'config.json'}: torch_dtype {said} is no type to run in",
            f"weights become {', '.join(types)}",
            "choose one with --dtype",
        )
    return types[said]


def torch_device(name: str) -> "torch.device":
    """The device called `name`.

    Raises:
        UserError: There is none.
    """
    import torch

    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    kind, _, index = name.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if kind in kinds and (not index or (index.isdigit() and int(index) < count)):
        return torch.device(name)
    raise UserError(
        f"there is no device {name!r} here",
        f"PyTorch {torch.__version__} sees {', '.join(kinds)}" + (f", {count} of them" if kind in kinds[1:] else ""),
        "use --device cpu, or install a PyTorch that knows your device: nautile doctor",
    )
