"""The DeepSeek stack in one package: models, training, inference.

>>> import nautile
>>> model = nautile.load("runs/demo")
>>> llm = nautile.LLM("runs/demo")
>>> llm.generate("def add(a, b):", nautile.SamplingParams(max_tokens=16))[0].text
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nautile.infer.llm import LLM as LLM
    from nautile.infer.sampling import SamplingParams as SamplingParams
    from nautile.models.io import load_model as load
    from nautile.models.io import save_model as save

__version__ = metadata.version("nautile")

# Imported at first use: `nautile --help` must not wait for torch.
_LAZY = {
    "load": ("nautile.models.io", "load_model"),
    "save": ("nautile.models.io", "save_model"),
    "LLM": ("nautile.infer.llm", "LLM"),
    "SamplingParams": ("nautile.infer.sampling", "SamplingParams"),
}

__all__ = ["LLM", "SamplingParams", "load", "save"]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'nautile' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)
