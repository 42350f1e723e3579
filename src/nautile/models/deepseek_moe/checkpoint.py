"""Where our parameters lie in a published folder."""

from nautile.checkpoint.layout import ROTARY, Layout, stacked_experts
from nautile.models.deepseek_moe.config import DeepseekConfig


def layout(config: DeepseekConfig) -> Layout:
    """Stacked experts."""
    return Layout(splits=stacked_experts(), drops=[ROTARY])
