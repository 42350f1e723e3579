"""DeepGEMM's three sums over heads or batches, and the projection in front of hyper-connections."""

import torch
from torch import Tensor

from nautile import ops
from nautile.compat.deep_gemm.errors import need, sm100_only
from nautile.compat.deep_gemm.fp8 import filled
from nautile.compat.deep_gemm.operands import DEFAULT_RECIPE, Pair, Recipe, fp8, k_major, result

HEADWISE = ("bhr,hdr->bhd", "bhd,hdr->bhr")
BATCH_SUM = "bmk,bnk->mn"
BF16, FP32 = torch.bfloat16, torch.float32


def einsum(expr: str, a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None, use_cublaslt: bool = False) -> None:
    """``d = einsum(expr, a, b)`` of bfloat16 tensors, summed in float32.

    Args:
        expr: ``bmk,bnk->mn`` (a sum of products), ``bhr,hdr->bhd`` or ``bhd,hdr->bhr`` (one product per head).
        a: bfloat16.
        b: bfloat16.
        d: bfloat16, written. For ``bmk,bnk->mn`` also float32; then `c` must be `d`, which is added to.
        c: See `d`.
        use_cublaslt: Has no effect: products per head are torch's.

    Raises:
        DeepGemmError: Another expression, or operands that do not fit it.
    """
    need(expr in (BATCH_SUM, *HEADWISE), "einsum", f"expr must be one of {(BATCH_SUM, *HEADWISE)}, got {expr!r}")
    for name, x in (("a", a), ("b", b)):
        need(x.dtype == BF16 and x.dim() == 3, "einsum", f"{name} must be bfloat16 with 3 dimensions, got {x.dtype}")
        need(k_major(x), "einsum", f"{name} must be contiguous in its last dimension")
    need(d.dtype in (BF16, FP32), "einsum", f"d must be bfloat16 or float32, got {d.dtype}")
    shape = _shape(expr, a, b)
    if expr == BATCH_SUM:
        need(not use_cublaslt, "einsum", "cuBLASLt does not sum over a batch")
        need(
            (c is None) if d.dtype == BF16 else (c is not None and c.data_ptr() == d.data_ptr()),
            "einsum",
            "a float32 d is added to and must be given as c, too; a bfloat16 one is not",
        )
        result("einsum", d, shape, (d.dtype,), c)
        (m, n), batch = shape, a.shape[0]
        rows, columns = (x.transpose(1, 2).reshape(-1, x.shape[1]) for x in (a, b))
        ends = torch.tensor([batch * a.shape[2]], dtype=torch.int32, device=a.device)
        total = ops.k_grouped_gemm(rows, columns, ends)[0]
        assert total.shape == (m, n)
        _ = d.add_(total) if c is not None else d.copy_(total)
        return
    need(c is None and d.dtype == BF16, "einsum", f"{expr} writes bfloat16 and adds to nothing")
    result("einsum", d, shape, (BF16,))
    d.copy_(torch.einsum(expr, a, b))


def fp8_einsum(
    expr: str, a: Pair, b: Pair, d: Tensor, c: Tensor | None = None, recipe: Recipe = DEFAULT_RECIPE
) -> None:
    """``bhr,hdr->bhd`` of FP8 operands: one product per head.

    Args:
        expr: ``bhr,hdr->bhd``; the others need SM100.
        a: Data [B, H, R] and scales [B, H, ⌈R / 128⌉].
        b: Data [H, D, R] and scales [H, ⌈D / 128⌉, ⌈R / 128⌉].
        d: bfloat16 [B, H, D], written.
        c: Must be None on SM90.
        recipe: (1, 128, 128).

    Raises:
        DeepGemmError: Operands do not fit together.
        NotOnHopperError: Another expression, or `c` is given.
    """
    name = "fp8_einsum"
    if expr != HEADWISE[0]:
        sm100_only(name, f"{expr!r}")
    if c is not None:
        sm100_only(name, "adding to c")
    left = fp8(name, "a", (a[0].transpose(0, 1), a[1].transpose(0, 1)), (recipe[0], recipe[2]), 3)
    right = fp8(name, "b", b, (recipe[1], recipe[2]), 3)
    (H, B, R), (H_b, D, R_b) = left.shape, right.shape
    need((H_b, R_b) == (H, R), name, f"a {list(a[0].shape)} and b {list(b[0].shape)} differ in heads or depth")
    result(name, d, (B, H, D), (BF16,))
    if d.numel():
        counts = torch.full((H,), B, dtype=torch.int32, device=d.device)
        d.copy_(ops.masked_fp8_gemm(filled(left), filled(right), counts).transpose(0, 1))


def tf32_hc_prenorm_gemm(a: Tensor, b: Tensor, d: Tensor, sqr_sum: Tensor, num_splits: int | None = None) -> None:
    """``d = a @ b.T`` and the sum of squares of each row of a, for a norm that is applied after the product.

    Args:
        a: bfloat16 [M, K].
        b: float32 [N, K].
        d: float32 [M, N], written; [num_splits, M, N] with `num_splits`, to be summed by the caller.
        sqr_sum: float32 [M], written; [num_splits, M] with `num_splits`.
        num_splits: Into how many sums over parts of K the results are divided.

    Raises:
        DeepGemmError: Operands do not fit together.
    """
    name = "tf32_hc_prenorm_gemm"
    need(a.dtype == BF16 and a.dim() == 2 and k_major(a), name, f"a must be K-major bfloat16 [M, K], got {a.dtype}")
    need(b.dtype == FP32 and b.dim() == 2 and k_major(b), name, f"b must be K-major float32 [N, K], got {b.dtype}")
    (M, K), (N, K_b) = a.shape, b.shape
    need(K_b == K and N > 0 and K > 0, name, f"a {list(a.shape)} and b {list(b.shape)} differ in K, or are empty")
    need(num_splits is None or num_splits >= 1, name, f"num_splits must be 1 or more, got {num_splits}")
    lead = () if num_splits is None else (num_splits,)
    result(name, d, (*lead, M, N), (FP32,))
    need(
        sqr_sum.dtype == FP32 and tuple(sqr_sum.shape) == (*lead, M) and sqr_sum.is_contiguous(),
        name,
        f"sqr_sum must be contiguous float32 {[*lead, M]}, got {sqr_sum.dtype} {list(sqr_sum.shape)}",
    )
    parts, sums = (d, sqr_sum) if lead else (d[None], sqr_sum[None])
    count = num_splits or 1
    for split in range(count):
        columns = slice(split * K // count, (split + 1) * K // count)
        wide = a[:, columns].float()
        torch.mm(wide, b[:, columns].t(), out=parts[split])
        torch.linalg.vecdot(wide, wide, out=sums[split])


def _shape(expr: str, a: Tensor, b: Tensor) -> tuple[int, ...]:
    """Shape of the result; raises if the operands disagree in a letter."""
    letters = expr.replace("->", ",").split(",")
    sizes: dict[str, int] = {}
    for name, dims, x in (("a", letters[0], a), ("b", letters[1], b)):
        for letter, size in zip(dims, x.shape, strict=True):
            need(
                sizes.setdefault(letter, size) == size,
                "einsum",
                f"{name} {list(x.shape)} has {letter} = {size} in {expr}, the other {sizes[letter]}",
            )
    return tuple(sizes[letter] for letter in letters[2])
