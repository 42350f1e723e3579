"""Where our parameters lie in a published folder: under the same names."""

from nautile.checkpoint.layout import ROTARY, Layout
from nautile.models.llama.config import LlamaConfig


def layout(config: LlamaConfig) -> Layout:
    """Nothing to rename, nothing to split."""
    return Layout(drops=[ROTARY])
