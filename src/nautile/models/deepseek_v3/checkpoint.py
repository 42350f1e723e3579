"""Differences between our parameter names and the published DeepSeek-V3 tensors.

- Experts are stacked here and one tensor each in the files.
- MTP module k is ``mtp.k.*`` here and ``model.layers.{num_hidden_layers + k}.*`` in the files, where its block's
  tensors stand beside its norms, and where embedding and output head are stored again.
"""

import re
from collections.abc import Iterator

from torch import Tensor

from nautile.checkpoint.layout import Layout, Piece, Rule
from nautile.models.deepseek_v3.config import DeepseekV3Config


def layout(config: DeepseekV3Config) -> Layout:
    """Layout of a published DeepseekV3ForCausalLM folder."""

    def published(name: str) -> str:
        match = re.fullmatch(r"mtp\.(\d+)\.(?:block\.)?(.+)", name)
        return f"model.layers.{config.num_hidden_layers + int(match[1])}.{match[2]}" if match else name

    def gate_up(match: re.Match[str], parameter: Tensor) -> Iterator[Piece]:
        E, width, _ = parameter.shape
        for e in range(E):
            yield Piece(f"{published(match[1])}.{e}.gate_proj.weight", (e, slice(0, width // 2)))
            yield Piece(f"{published(match[1])}.{e}.up_proj.weight", (e, slice(width // 2, width)))

    def down(match: re.Match[str], parameter: Tensor) -> Iterator[Piece]:
        for e in range(parameter.shape[0]):
            yield Piece(f"{published(match[1])}.{e}.down_proj.weight", (e,))

    copies = {}
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"model.layers.{layer}.shared_head.head.weight"] = "lm_head.weight"
    return Layout(
        rules=[
            Rule(r"(.+\.experts)\.gate_up_proj", gate_up),
            Rule(r"(.+\.experts)\.down_proj", down),
            Rule(r"mtp\..+", lambda match, _: [Piece(published(match[0]))]),
        ],
        copies=copies,
    )
