"""Bytes that training and inference hold on one rank.

Letters: D hidden, H heads, N nope, R rope, V value, C key-value latent, E experts, K experts per token, F expert width,
S sequence length.
"""

from dataclasses import dataclass

from nautile.models.accounting.cache import cache_cost
from nautile.models.accounting.parameters import mtp_parameters, parameters, total
from nautile.models.accounting.shape import GroupedAttention, Shape


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one rank while a backward pass begins. Short-lived buffers of single operations come on top."""

    weights: int
    """float32 master weights."""
    gradients: int
    """float32."""
    moments: int
    """The two float32 moments of AdamW."""
    casts: int
    """bfloat16 copies of the weights that autocast keeps for backward; 0 in fp32."""
    activations: int
    """What backward needs of the forward pass, without recomputation."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.moments + self.casts + self.activations


def training_memory(
    shape: Shape, batch_size: int, sequence_length: int, *, bf16: bool = False, moment_shards: int = 1
) -> TrainingMemory:
    """Memory of one rank that runs `batch_size` sequences forward at once.

    Args:
        shape: The model; its MTP modules are trained along.
        batch_size: Sequences per forward on this rank.
        sequence_length: Tokens of each.
        bf16: Matrix products under bfloat16 autocast; weights, gradients and moments stay float32.
        moment_shards: Ranks that divide the optimiser's moments among them (ZeRO-1, arXiv 1910.02054).
    """
    count = total(parameters(shape)).total + mtp_parameters(shape).total
    token = activation_bytes_per_token(shape, sequence_length, bf16=bf16)
    return TrainingMemory(
        weights=4 * count,
        gradients=4 * count,
        moments=-(-8 * count // moment_shards),
        casts=2 * count if bf16 else 0,
        activations=token * batch_size * sequence_length,
    )


def activation_bytes_per_token(shape: Shape, sequence_length: int, *, bf16: bool) -> int:
    """Bytes per token that backward reads again, as nautile's CPU operations keep them.

    The residual stream stays float32; the rest is in the type of the matrix products. Attention probabilities are
    kept, (S + 1)/2 per head and token: the part that grows with the sequence. Output logits never exist at once and
    count nothing.
    """
    blocks = shape.layers + shape.mtp_modules
    moe_layers = shape.moe_layers + shape.mtp_moe_modules
    residual = shape.hidden * (2 * blocks + 1 + shape.mtp_modules)
    kept = blocks * (shape.hidden + _attention_activations(shape, sequence_length))
    kept += (blocks - moe_layers) * (shape.hidden + 3 * shape.dense_width) + moe_layers * _moe_activations(shape)
    # An MTP module's two normed inputs, joined once more for its projection.
    kept += shape.mtp_modules * 4 * shape.hidden
    return 4 * residual + (2 if bf16 else 4) * kept


def _attention_activations(shape: Shape, sequence_length: int) -> int:
    """Elements per token: queries, keys, values, their latents before and after the norm, probabilities, output."""
    attention, H = shape.attention, shape.heads
    probabilities = H * (sequence_length + 1) // 2
    if isinstance(attention, GroupedAttention):
        return 2 * (H + attention.kv_heads) * attention.head_dim + probabilities
    latents = 2 * (attention.q_lora_rank or 0) + 2 * attention.kv_lora_rank + attention.rope
    query_and_key = 2 * H * (attention.nope + attention.rope)
    return latents + query_and_key + 2 * H * attention.value + probabilities


def _moe_activations(shape: Shape) -> int:
    """Elements per token: the normed input, gate and up of K experts, the shared expert, the router's scores."""
    experts = shape.experts
    if experts is None:
        return 0
    routed = 2 * experts.per_token * experts.width
    return shape.hidden + routed + 3 * experts.shared * experts.width + 2 * experts.routed


@dataclass(frozen=True)
class InferenceMemory:
    """Bytes while a model generates."""

    weights: int
    """The main model in bfloat16."""
    cache: int
    """The attention cache of the whole batch in bfloat16."""

    @property
    def total(self) -> int:
        """Both."""
        return self.weights + self.cache


def inference_memory(shape: Shape, batch_size: int, context: int) -> InferenceMemory:
    """Weights, and the cache of `batch_size` sequences of `context` tokens, at 2 bytes an element."""
    return InferenceMemory(2 * total(parameters(shape)).total, 2 * cache_cost(shape).elements * batch_size * context)
