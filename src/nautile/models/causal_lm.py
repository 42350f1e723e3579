"""A causal language model: decoder, output head and, where the family has them, MTP modules.

A family's `model.py` builds the blocks; everything around them is the same in all families and stands here.
"""

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from nautile.checkpoint.allocate import float32_names
from nautile.core.context import CacheSpec, ForwardContext
from nautile.layers.attention.indexer import Indexer
from nautile.layers.block import Block
from nautile.layers.decoder import Decoder, DecoderOutput
from nautile.layers.linear import Linear
from nautile.layers.moe.experts import Experts
from nautile.layers.moe.router import Router
from nautile.layers.mtp import MTPModule
from nautile.models.config import DecoderConfig


class CausalLM(nn.Module):
    """Decoder, output head and MTP modules.

    Weights are uninitialised until `init_weights` or a checkpoint fills them, so a 671 B model can be built on the
    meta device.

    Args:
        config: The family's configuration.
        blocks: The decoder's blocks, bottom to top.
        mtp_blocks: The block of each MTP module.
    """

    def __init__(self, config: DecoderConfig, blocks: Sequence[Block], mtp_blocks: Sequence[Block] = ()) -> None:
        super().__init__()
        self.config = c = config
        self.model = Decoder(c.vocab_size, c.hidden_size, blocks, c.rms_norm_eps)
        self.lm_head = Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.mtp = nn.ModuleList(MTPModule(c.hidden_size, c.rms_norm_eps, block) for block in mtp_blocks)

    def forward(self, tokens_BS: Tensor, ctx: ForwardContext | None = None) -> Tensor:
        """float32 logits [B, S, V] of the token after each position, from int64 ids [B, S]."""
        return self.lm_head(self.hidden(ctx or ForwardContext.for_tokens(tokens_BS)).hidden_BSD).float()

    def hidden(self, ctx: ForwardContext) -> DecoderOutput:
        """Hidden states after the final norm, and the routers' decisions."""
        return self.model(ctx)

    def predict_ahead(self, hidden_BSD: Tensor, tokens_BW: Tensor, ctx: ForwardContext) -> list[DecoderOutput]:
        """Hidden states of each MTP depth k = 1..D: position i is to predict tokens[i + 1 + k].

        Args:
            hidden_BSD: The main model's hidden states after the final norm.
            tokens_BW: int64 ids with W > S − 1 + k tokens where they exist. Positions whose token k further on lies
                beyond the window take the last one; they come last, so causality keeps them from the others.
            ctx: Context of the main forward.
        """
        S = hidden_BSD.shape[1]
        outputs = []
        for depth, module in enumerate(self.mtp, start=1):
            ahead = torch.arange(depth, depth + S, device=tokens_BW.device).clamp(max=tokens_BW.shape[1] - 1)
            outputs.append(module(hidden_BSD, self.model.embed_tokens(tokens_BW[:, ahead]), ctx))
            hidden_BSD = outputs[-1].hidden_BSD
        return outputs

    def mtp_logits(self, tokens_BS: Tensor) -> list[Tensor]:
        """float32 logits of each depth k, [B, S − k, V]; entry i is about token i + 1 + k. Empty without modules."""
        ctx = ForwardContext.for_tokens(tokens_BS)
        outputs = self.predict_ahead(self.hidden(ctx).hidden_BSD, tokens_BS, ctx)
        return [self.lm_head(out.hidden_BSD[:, :-depth]).float() for depth, out in enumerate(outputs, start=1)]

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Normal weights of std `initializer_range` (V3 §4.2), norms 1, biases 0."""
        vectors = {id(p): name for name, p in self.named_parameters() if p.dim() == 1}
        for parameter in self.parameters():
            if id(parameter) not in vectors:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)
            elif vectors[id(parameter)].endswith("bias"):
                parameter.zero_()
            else:
                parameter.fill_(1.0)
        for router in self.routers():
            if router.e_score_correction_bias is not None:
                router.e_score_correction_bias.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `half` and `bfloat16` do. Buffers and `keep_float32` parameters move, but are never narrowed:

        a correction bias that has been rounded chooses other experts, and nobody would notice.
        """
        kept = dict(self.named_buffers()) | {name: self.get_parameter(name).detach() for name in float32_names(self)}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            owner, _, leaf = name.rpartition(".")
            now = getattr(self.get_submodule(owner), leaf)
            if now.dtype.itemsize < before.dtype.itemsize:
                now.data = before.to(now.device)
        return self

    def routers(self) -> list[Router]:
        """Routers in the order of the decisions of `hidden`, then of `predict_ahead`."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def expert_parameters(self) -> list[nn.Parameter]:
        """Weights of the routed experts: what expert parallelism shards."""
        return [p for module in self.modules() if isinstance(module, Experts) for p in module.parameters()]

    def indexer_parameters(self) -> list[nn.Parameter]:
        """Weights of the indexers of sparse attention: what a loss of its own trains."""
        return [p for module in self.modules() if isinstance(module, Indexer) for p in module.parameters()]

    def cache_specs(self) -> list[CacheSpec]:
        """What each decoder layer stores per token, bottom to top."""
        return self.model.cache_specs()
