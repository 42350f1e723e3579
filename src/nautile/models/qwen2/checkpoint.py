"""Where our parameters lie in a published folder: under the same names."""

from nautile.checkpoint.layout import ROTARY, Layout
from nautile.models.qwen2.config import Qwen2Config


def layout(config: Qwen2Config) -> Layout:
    """Nothing to rename, nothing to split."""
    return Layout(drops=[ROTARY])
