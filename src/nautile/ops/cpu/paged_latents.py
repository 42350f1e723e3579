"""Decoding over a paged cache of latents in C++: pages are read where they lie, once, as keys and as values."""

import torch
from torch import Tensor

from nautile.core import jit
from nautile.ops.cpu import mla_decode
from nautile.ops.reference import paged_latents as reference
from nautile.ops.split_kv import Splits

__all__ = ["paged_mla_decode", "why_not"]


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Native code is for CPUs with a compiler, in two dtypes."""
    if device.type != "cpu":
        return f"tensors are on {device.type}"
    if dtype not in mla_decode.DTYPES:
        return f"{dtype} is not one of float32, bfloat16"
    return jit.why_no_cxx()


def paged_mla_decode(
    q_BSHX: Tensor,
    cache_NPGX: Tensor,
    block_table_BW: Tensor,
    lengths_B: Tensor,
    v_dim: int,
    scale: float,
    causal: bool,
    splits: Splits | None,
) -> tuple[Tensor, Tensor]:
    """See `nautile.ops.paged_mla_decode`. The heads of each latent head, and a few queries at a time."""
    (B, S, H, _), G = q_BSHX.shape, cache_NPGX.shape[2]
    J = H // G
    if not mla_decode.takes(q_BSHX[:, :1, :1], cache_NPGX):
        return reference.paged_mla_decode(q_BSHX, cache_NPGX, block_table_BW, lengths_B, v_dim, scale, causal, splits)
    last_BS = (lengths_B.long() - 1)[:, None].expand(B, S)
    if causal:
        last_BS = last_BS - torch.arange(S - 1, -1, -1, device="cpu")
    o_BSHV = q_BSHX.new_empty(B, S, H, v_dim)
    lse_BHS = q_BSHX.new_empty(B, H, S, dtype=torch.float32)
    step = max(1, mla_decode.MOST_QUERIES // J)
    for g in range(G):
        c_NPV, rope_NPR = cache_NPGX[:, :, g, :v_dim], cache_NPGX[:, :, g, v_dim:]
        for s in range(0, S, step):
            of = slice(s, s + step), slice(g * J, (g + 1) * J)
            q = q_BSHX[:, *of]
            o_BSHV[:, *of], lse_BHS[:, of[1], of[0]] = mla_decode.decode(
                q[..., :v_dim], q[..., v_dim:], c_NPV, rope_NPR, last_BS[:, of[0]], scale, block_table_BW
            )
    return o_BSHV, lse_BHS
