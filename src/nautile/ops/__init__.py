"""Kernels: one public function per op here, its plain specification in `reference/`, faster twins beside it.

``from nautile import ops`` is free of torch; the first use of a name imports its topic.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nautile.ops.activation import swiglu
    from nautile.ops.attention import causal_attention
    from nautile.ops.cached import cached_attention, latent_attention
    from nautile.ops.cross_entropy import linear_cross_entropy
    from nautile.ops.dispatch import choices, use
    from nautile.ops.e5m6 import dequantize_e5m6, quantize_e5m6
    from nautile.ops.experts import grouped_swiglu
    from nautile.ops.fp8_products import fp8_gemm, grouped_fp8_gemm, k_grouped_fp8_gemm, masked_fp8_gemm
    from nautile.ops.grouped_products import grouped_gemm, k_grouped_gemm, masked_gemm
    from nautile.ops.index_logits import mqa_logits, paged_mqa_logits
    from nautile.ops.indexer import index_scores, top_rows
    from nautile.ops.indexer_loss import indexer_kl
    from nautile.ops.latent_bytes import quantize_latents, store_latents
    from nautile.ops.norm import rms_norm
    from nautile.ops.packed import packed_linear
    from nautile.ops.packed_mixture import packed_experts
    from nautile.ops.packed_weight import PackedWeight, pack_weight
    from nautile.ops.paged_latents import paged_mla_decode, paged_sparse_mla_decode
    from nautile.ops.projection import gated_linear, linear
    from nautile.ops.quantization import dequantize_fp8, quantize_fp8, requantize_transposed
    from nautile.ops.rotary import rotate_half_split, rotate_interleaved
    from nautile.ops.routing import combine_tokens, permute_tokens, topk_gate
    from nautile.ops.scale_packing import mn_major_scales
    from nautile.ops.sparse_attention import gathered_attention, selected_attention
    from nautile.ops.sparse_prefill import sparse_mla_prefill
    from nautile.ops.split_plan import plan_splits
    from nautile.ops.swiglu_quantization import swiglu_quantize, swiglu_quantize_backward

_HOME = {
    "PackedWeight": "packed_weight",
    "cached_attention": "cached",
    "causal_attention": "attention",
    "choices": "dispatch",
    "combine_tokens": "routing",
    "dequantize_e5m6": "e5m6",
    "dequantize_fp8": "quantization",
    "fp8_gemm": "fp8_products",
    "gated_linear": "projection",
    "gathered_attention": "sparse_attention",
    "grouped_fp8_gemm": "fp8_products",
    "grouped_gemm": "grouped_products",
    "grouped_swiglu": "experts",
    "index_scores": "indexer",
    "indexer_kl": "indexer_loss",
    "k_grouped_fp8_gemm": "fp8_products",
    "k_grouped_gemm": "grouped_products",
    "latent_attention": "cached",
    "linear": "projection",
    "linear_cross_entropy": "cross_entropy",
    "masked_fp8_gemm": "fp8_products",
    "masked_gemm": "grouped_products",
    "mn_major_scales": "scale_packing",
    "mqa_logits": "index_logits",
    "pack_weight": "packed_weight",
    "packed_experts": "packed_mixture",
    "packed_linear": "packed",
    "paged_mla_decode": "paged_latents",
    "paged_mqa_logits": "index_logits",
    "paged_sparse_mla_decode": "paged_latents",
    "permute_tokens": "routing",
    "plan_splits": "split_plan",
    "quantize_e5m6": "e5m6",
    "quantize_fp8": "quantization",
    "quantize_latents": "latent_bytes",
    "requantize_transposed": "quantization",
    "rms_norm": "norm",
    "rotate_half_split": "rotary",
    "rotate_interleaved": "rotary",
    "selected_attention": "sparse_attention",
    "sparse_mla_prefill": "sparse_prefill",
    "store_latents": "latent_bytes",
    "swiglu": "activation",
    "swiglu_quantize": "swiglu_quantization",
    "swiglu_quantize_backward": "swiglu_quantization",
    "top_rows": "indexer",
    "topk_gate": "routing",
    "use": "dispatch",
}

__all__ = [
    "PackedWeight",
    "cached_attention",
    "causal_attention",
    "choices",
    "combine_tokens",
    "dequantize_e5m6",
    "dequantize_fp8",
    "fp8_gemm",
    "gated_linear",
    "gathered_attention",
    "grouped_fp8_gemm",
    "grouped_gemm",
    "grouped_swiglu",
    "index_scores",
    "indexer_kl",
    "k_grouped_fp8_gemm",
    "k_grouped_gemm",
    "latent_attention",
    "linear",
    "linear_cross_entropy",
    "masked_fp8_gemm",
    "masked_gemm",
    "mn_major_scales",
    "mqa_logits",
    "pack_weight",
    "packed_experts",
    "packed_linear",
    "paged_mla_decode",
    "paged_mqa_logits",
    "paged_sparse_mla_decode",
    "permute_tokens",
    "plan_splits",
    "quantize_e5m6",
    "quantize_fp8",
    "quantize_latents",
    "requantize_transposed",
    "rms_norm",
    "rotate_half_split",
    "rotate_interleaved",
    "selected_attention",
    "sparse_mla_prefill",
    "store_latents",
    "swiglu",
    "swiglu_quantize",
    "swiglu_quantize_backward",
    "top_rows",
    "topk_gate",
    "use",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
