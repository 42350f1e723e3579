"""Where our parameters lie in a published folder."""

from nautile.checkpoint.layout import ROTARY, Layout, stacked_experts
from nautile.models.deepseek_v2.config import DeepseekV2Config


def layout(config: DeepseekV2Config) -> Layout:
    """Stacked experts."""
    return Layout(splits=stacked_experts(), drops=[ROTARY])
