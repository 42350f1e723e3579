"""MLA's attention of the tokens of a prompt to the rows that an indexer chose, for training, too.

(DeepSeek-V3.2-Exp §2.1; the interface of FlashMLA's ``flash_mla_sparse_fwd``.) `gathered_attention` with one sequence,
latent and rotated part in one tensor, an attention sink, and the statistics of the softmax. S queries, H heads, T rows,
K places for row numbers, X = V + rotated part.
"""

import torch
from torch import Tensor

from nautile.ops.attention_nodes import prefill_node
from nautile.ops.checks import same_device
from nautile.ops.dispatch import implementation
from nautile.ops.precision import compute_dtype


def sparse_mla_prefill(
    q_SHX: Tensor,
    kv_TX: Tensor,
    rows_SK: Tensor,
    scale: float,
    v_dim: int = 512,
    sink_H: Tensor | None = None,
    topk_length_S: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of each query to the rows it names, which are key and, in their first `v_dim` numbers, value.

    ``x_shk = scale · q_sh·kv_r`` with r = rows[s, k], over the valid places k: those below topk_length[s] whose r is a
    row number. ``lse_sh = ln Σ_k exp x_shk,  o_sh = Σ_k exp(x_shk) kv_r[:v_dim] / (exp lse_sh + exp sink_h)``: a sink
    takes weight and gives nothing. A row named twice counts twice. Rows that nobody names, and those named only in
    places that are not valid, are not read: they may hold anything. Sums run in float32 or better.

    Differentiable in q, kv and sink; `max_logits` and `lse` carry no gradient. The gradient of a row is the sum over
    all queries that name it: Triton adds in float32 in any order, unless ``torch.use_deterministic_algorithms(True)``
    asks for the same order each time.

    Args:
        q_SHX: Queries with W_UK folded in, then their rotated part.
        kv_TX: Latents, then rotated keys.
        rows_SK: int32 or int64. −1, and any number that is no row of kv, marks an unused place.
        scale: Factor on the scores.
        v_dim: Width V of the values, at most X.
        sink_H: One logit per head in float32 (float64 for double inputs), ±inf allowed: −inf changes nothing, +inf
            makes the output 0.
        topk_length_S: int32 or int64: how many places of each query count, from the left. None: all K.

    Returns:
        o_SHV in the compute dtype (the autocast dtype under autocast, else the dtype of q), max_logits_SH = max_k x and
        lse_SH (natural logarithm, without the sink) in float32, or float64 for double inputs. A query without any
        valid place gives o = 0, max_logits = −inf and lse = +inf.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
    """
    _check(q_SHX, kv_TX, rows_SK, v_dim, sink_H, topk_length_S)
    if torch.compiler.is_compiling():
        return prefill_node(q_SHX, kv_TX, rows_SK, sink_H, topk_length_S, scale, v_dim, compute_dtype(q_SHX))
    run = implementation("sparse_mla_prefill", q_SHX)
    return run(q_SHX, kv_TX, rows_SK, scale, v_dim, sink_H, topk_length_S)


def _check(
    q_SHX: Tensor, kv_TX: Tensor, rows_SK: Tensor, v_dim: int, sink_H: Tensor | None, topk_length_S: Tensor | None
) -> None:
    op = "sparse_mla_prefill"
    if q_SHX.dim() != 3 or kv_TX.dim() != 2 or q_SHX.shape[2] != kv_TX.shape[1]:
        raise ValueError(f"{op}: q and kv must be [S, H, X] and [T, X], got {list(q_SHX.shape)}, {list(kv_TX.shape)}")
    if not q_SHX.dtype.is_floating_point or not kv_TX.dtype.is_floating_point:
        raise ValueError(f"{op}: q and kv must be floating point, got {q_SHX.dtype} and {kv_TX.dtype}")
    S, H, X = q_SHX.shape
    if not 0 < v_dim <= X:
        raise ValueError(f"{op}: v_dim must be from 1 to {X}, the width of kv, got {v_dim}")
    integers = (torch.int32, torch.int64)
    if rows_SK.dim() != 2 or rows_SK.shape[0] != S or rows_SK.dtype not in integers:
        raise ValueError(
            f"{op}: rows must be int32 or int64 [S, K] with S = {S}, got {rows_SK.dtype} {list(rows_SK.shape)}"
        )
    if sink_H is not None and (sink_H.shape != (H,) or not sink_H.dtype.is_floating_point):
        raise ValueError(f"{op}: sink must be floating point [H] = [{H}], got {sink_H.dtype} {list(sink_H.shape)}")
    if topk_length_S is not None and (topk_length_S.shape != (S,) or topk_length_S.dtype not in integers):
        raise ValueError(
            f"{op}: topk_length must be int32 or int64 [S] = [{S}], "
            f"got {topk_length_S.dtype} {list(topk_length_S.shape)}"
        )
    same_device(op, q=q_SHX, kv=kv_TX, rows=rows_SK, sink=sink_H, topk_length=topk_length_S)
