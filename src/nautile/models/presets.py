"""Every published shape by name, over all families. Nothing here imports torch."""

from nautile.models.config import DecoderConfig
from nautile.models.deepseek_moe.config import PRESETS as DEEPSEEK_MOE
from nautile.models.deepseek_v2.config import PRESETS as DEEPSEEK_V2
from nautile.models.deepseek_v3.config import PRESETS as DEEPSEEK_V3
from nautile.models.deepseek_v32.config import PRESETS as DEEPSEEK_V32
from nautile.models.llama.config import PRESETS as LLAMA
from nautile.models.qwen2.config import PRESETS as QWEN2

PRESETS: dict[str, DecoderConfig] = {**DEEPSEEK_MOE, **DEEPSEEK_V2, **DEEPSEEK_V3, **DEEPSEEK_V32, **LLAMA, **QWEN2}
"""Name on the command line → configuration."""
