"""DeepSeek-V3: the wiring (V3 paper, arXiv 2412.19437, §2)."""

import torch
from torch import Tensor, nn

from nautile.core.context import CacheSpec, ForwardContext
from nautile.layers.attention.mla import MLA
from nautile.layers.block import Block
from nautile.layers.decoder import Decoder, DecoderOutput
from nautile.layers.ffn import SwiGLU
from nautile.layers.moe.experts import Experts
from nautile.layers.moe.layer import MoE
from nautile.layers.moe.router import Router
from nautile.layers.mtp import MTPModule
from nautile.layers.norm import RMSNorm
from nautile.layers.rope import Rope
from nautile.models.deepseek_v3.config import DeepseekV3Config


class DeepseekV3ForCausalLM(nn.Module):
    """Decoder, output head and MTP modules.

    Weights are uninitialised until `init_weights` or a checkpoint fills them, so a 671 B model can be built on the
    meta device.
    """

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        config.check()
        self.config = c = config
        blocks = [build_block(c, i) for i in range(c.num_hidden_layers)]
        self.model = Decoder(c.vocab_size, c.hidden_size, blocks, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.mtp = nn.ModuleList(
            MTPModule(c.hidden_size, c.rms_norm_eps, build_block(c, c.num_hidden_layers + depth))
            for depth in range(c.num_nextn_predict_layers)
        )

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
        """float32 logits of each depth k, [B, S − k, V]; entry i is about token i + 1 + k."""
        ctx = ForwardContext.for_tokens(tokens_BS)
        outputs = self.predict_ahead(self.hidden(ctx).hidden_BSD, tokens_BS, ctx)
        return [self.lm_head(out.hidden_BSD[:, :-depth]).float() for depth, out in enumerate(outputs, start=1)]

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Normal weights of std `initializer_range` (V3 §4.2), norms 1, correction biases 0."""
        for module in self.modules():
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, Router) and module.e_score_correction_bias is not None:
                module.e_score_correction_bias.zero_()
        norms = {id(module.weight) for module in self.modules() if isinstance(module, RMSNorm)}
        for parameter in self.parameters():
            if id(parameter) not in norms:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)

    def routers(self) -> list[Router]:
        """Routers in the order of the decisions of `hidden`, then of `predict_ahead`."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def expert_parameters(self) -> list[nn.Parameter]:
        """Weights of the routed experts: what expert parallelism shards."""
        return [p for module in self.modules() if isinstance(module, Experts) for p in module.parameters()]

    def cache_specs(self) -> list[CacheSpec]:
        """What each decoder layer stores per token, bottom to top."""
        return self.model.cache_specs()


def build_block(c: DeepseekV3Config, layer: int) -> Block:
    """Block of global index `layer`: dense below `first_k_dense_replace`, MoE above and in the MTP modules."""
    attention = MLA(
        layer,
        c.hidden_size,
        c.num_attention_heads,
        q_lora_rank=c.q_lora_rank,
        kv_lora_rank=c.kv_lora_rank,
        nope_dim=c.qk_nope_head_dim,
        rope_dim=c.qk_rope_head_dim,
        v_dim=c.v_head_dim,
        rope=Rope(c.qk_rope_head_dim, c.rope_theta, c.rope_scaling),
    )
    mlp = SwiGLU(c.hidden_size, c.intermediate_size) if layer < c.first_k_dense_replace else build_moe(c)
    return Block(c.hidden_size, c.rms_norm_eps, attention, mlp)


def build_moe(c: DeepseekV3Config) -> MoE:
    """Router, routed experts and the fused shared expert of one layer."""
    router = Router(
        c.hidden_size,
        c.n_routed_experts,
        c.num_experts_per_tok,
        scoring_func=c.scoring_func,
        method=c.topk_method,
        n_group=c.n_group,
        topk_group=c.topk_group,
        normalise=c.norm_topk_prob,
        scaling_factor=c.routed_scaling_factor,
    )
    experts = Experts(c.n_routed_experts, c.hidden_size, c.moe_intermediate_size)
    shared_width = c.n_shared_experts * c.moe_intermediate_size
    return MoE(router, experts, SwiGLU(c.hidden_size, shared_width) if shared_width else None)
