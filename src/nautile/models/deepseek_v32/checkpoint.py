"""Where our parameters lie in a published DeepSeek-V3.2 folder."""

from nautile.checkpoint.layout import ROTARY, Layout, relocated_mtp, stacked_experts
from nautile.models.deepseek_v32.config import DeepseekV32Config


def layout(config: DeepseekV32Config) -> Layout:
    """Stacked experts, and MTP modules as further layers. The indexer's tensors have the same names on both sides."""
    renames, copies = relocated_mtp(config.num_hidden_layers, config.num_nextn_predict_layers)
    return Layout(renames=renames, splits=stacked_experts(), drops=[ROTARY], copies=copies)
