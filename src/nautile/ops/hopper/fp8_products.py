"""FP8 products on the tensor cores of a Hopper GPU; see fp8_gemm.cu for how."""

from functools import cache

import torch
from torch import Tensor

from nautile.core.cuda_driver import Kernel, bind, encode
from nautile.core.jit import compile_cuda
from nautile.ops.dispatch import forced_backend
from nautile.ops.fp8_tensor import Fp8Tensor
from nautile.ops.hopper import multiprocessors, unavailable
from nautile.ops.hopper.fp8_plan import HEADERS, KERNEL, SOURCE, Plan, Variant, movable, plan
from nautile.ops.hopper.tiles import Grouping


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Hopper only; and only on demand as long as the kernels have not been run on one."""
    reason = unavailable(device)
    if reason is None and forced_backend() != "hopper":
        return "not yet run on a GPU: NAUTILE_OPS=hopper forces it"
    return reason


def fp8_gemm(a: Fp8Tensor, b: Fp8Tensor, c_MN: Tensor | None, out_MN: Tensor) -> Tensor:
    """See `nautile.ops.fp8_gemm`."""
    return _product(Grouping.DENSE, a, b, None, c_MN, out_MN)


def grouped_fp8_gemm(a: Fp8Tensor, b: Fp8Tensor, groups_M: Tensor, out_MN: Tensor, alignment: int) -> Tensor:
    """See `nautile.ops.grouped_fp8_gemm`."""
    return _product(Grouping.ROWS, a, b, groups_M, None, out_MN, alignment)


def masked_fp8_gemm(a: Fp8Tensor, b: Fp8Tensor, counts_G: Tensor, out_GMN: Tensor) -> Tensor:
    """See `nautile.ops.masked_fp8_gemm`."""
    return _product(Grouping.MASKED, a, b, counts_G, None, out_GMN)


def k_grouped_fp8_gemm(
    a: Fp8Tensor, b: Fp8Tensor, ends_G: Tensor, c_GMN: Tensor | None, out_GMN: Tensor, alignment: int
) -> Tensor:
    """See `nautile.ops.k_grouped_fp8_gemm`."""
    return _product(Grouping.K_GROUPS, a, b, ends_G, c_GMN, out_GMN, alignment)


def _product(
    grouping: Grouping,
    a: Fp8Tensor,
    b: Fp8Tensor,
    layout: Tensor | None,
    c: Tensor | None,
    out: Tensor,
    alignment: int = 128,
) -> Tensor:
    if not out.numel():
        return out
    if not a.shape[-1] or (b.data.dim() == 3 and not b.shape[0]):
        return _empty_sums(grouping, layout, c, out)
    # Kernels write rows in one piece. C may be the result itself, and is then read before it is written.
    result = out if out.stride(-1) == 1 else torch.empty_like(out, memory_format=torch.contiguous_format).copy_(out)
    # Names, not temporaries: a plan holds addresses only.
    a, b = (x if (data := movable(x.data)) is x.data else Fp8Tensor(data, x.scale, x.block) for x in (a, b))
    layout = None if layout is None else layout.contiguous()
    c = c if c is None or c.stride(-1) == 1 else c.contiguous()
    sms = multiprocessors(out.device)
    launch(plan(grouping, a, b, result, sms=sms, layout=layout, c=c, alignment=alignment), out.device)
    return out if result is out else out.copy_(result)


def _empty_sums(grouping: Grouping, layout: Tensor | None, c: Tensor | None, out: Tensor) -> Tensor:
    """The product over no K, or with no group: C or 0 in every row that counts."""
    if grouping == Grouping.MASKED and layout is not None:
        counted_GM = torch.arange(out.shape[1], device=out.device) < layout[:, None]
        return out.masked_fill_(counted_GM[..., None], 0.0)
    return out.zero_() if c is None else out.copy_(c)


def launch(what: Plan, device: torch.device) -> None:
    """Run it on the current stream of `device`."""
    with torch.cuda.device(device):
        bind(torch.cuda.current_device())
        kernel = _kernel(what.variant, device)
        stream = torch.cuda.current_stream(device).cuda_stream
        kernel.launch(what.how, stream, (*map(encode, what.maps), what.args))


@cache
def _kernel(variant: Variant, device: torch.device) -> Kernel:
    cubin = compile_cuda(SOURCE, *HEADERS, defines=variant.defines())
    return Kernel(cubin, KERNEL, variant.tile.shared_bytes)
