"""Dense decoding over paged latents on a Hopper GPU; see mla_decode.cu for how."""

from functools import cache

import torch
from torch import Tensor

from nautile.core.cuda_driver import Kernel, bind, encode
from nautile.core.jit import compile_cuda
from nautile.ops.dispatch import forced_backend
from nautile.ops.hopper import multiprocessors, unavailable
from nautile.ops.hopper.mla_plan import HEADERS, KERNEL, MERGE, SHARED_BYTES, SOURCE, plan, why_unfit
from nautile.ops.split_kv import Splits, dense_parts
from nautile.ops.split_plan import plan_splits


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Hopper and bfloat16 only; and only on demand as long as the kernel has not been run on one."""
    reason = unavailable(device)
    if reason is None and dtype != torch.bfloat16:
        reason = f"{dtype} is not bfloat16"
    if reason is None and forced_backend() != "hopper":
        reason = "not yet run on a GPU: NAUTILE_OPS=hopper forces it"
    return reason


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
    """See `nautile.ops.paged_mla_decode`. Sizes other than DeepSeek's go to the Triton kernel."""
    if why_unfit(q_BSHX, cache_NPGX, v_dim):
        from nautile.ops.triton import paged_latents as portable

        return portable.paged_mla_decode(q_BSHX, cache_NPGX, block_table_BW, lengths_B, v_dim, scale, causal, splits)
    B, S, H, _ = q_BSHX.shape
    device = q_BSHX.device
    o_BSHV = q_BSHX.new_empty(B, S, H, v_dim)
    lse_BHS = q_BSHX.new_empty(B, H, S, dtype=torch.float32)
    if not o_BSHV.numel():
        return o_BSHV, lse_BHS
    q_BSHX, lengths_B = q_BSHX.contiguous(), lengths_B.contiguous()
    table_BW = block_table_BW if block_table_BW.stride(1) == 1 else block_table_BW.contiguous()
    if splits is None:
        splits = plan_splits(lengths_B, dense_parts(multiprocessors(device), S, H))
    R = splits.table_R3.shape[0]
    part_RSHV, part_RSH = lse_BHS.new_empty(R, S, H, v_dim), lse_BHS.new_empty(R, S, H)
    what = plan(q_BSHX, cache_NPGX, table_BW, lengths_B, splits, scale, causal, o_BSHV, lse_BHS, part_RSHV, part_RSH)
    with torch.cuda.device(device):
        bind(torch.cuda.current_device())
        stream = torch.cuda.current_stream(device).cuda_stream
        decode, merge = _kernels(device)
        decode.launch(what.how, stream, (*map(encode, what.maps), what.args))
        merge.launch(what.how_to_merge, stream, (what.args,))
    return o_BSHV, lse_BHS


@cache
def _kernels(device: torch.device) -> tuple[Kernel, Kernel]:
    cubin = compile_cuda(SOURCE, *HEADERS)
    return Kernel(cubin, KERNEL, SHARED_BYTES), Kernel(cubin, MERGE, 0)
