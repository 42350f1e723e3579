"""DeepGEMM's bfloat16 products ``D = C + A @ B`` on `nautile.ops`, named as the FP8 ones; on SM90 in either layout."""

import torch
from torch import Tensor

from nautile import ops
from nautile.compat.deep_gemm import settings
from nautile.compat.deep_gemm.errors import need, sm100_only
from nautile.compat.deep_gemm.fp8 import check_layout
from nautile.compat.deep_gemm.operands import k_major, matrix, result

BF16, FP32 = torch.bfloat16, torch.float32


def bf16_gemm_nt(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None, compiled_dims: str = "nk") -> None:
    """``d = c + a @ b.T`` with a [M, K], b [N, K] in bfloat16 and d in bfloat16 or float32, summed in float32.

    Raises:
        DeepGemmError: Operands do not fit together.
    """
    name = "bf16_gemm_nt"
    matrix(name, "a", a, 2, BF16)
    matrix(name, "b", b, 2, BF16)
    need(a.shape[1] == b.shape[1], name, f"a {list(a.shape)} and b {list(b.shape)} differ in K")
    result(name, d, (a.shape[0], b.shape[0]), (BF16, FP32), c)
    if not d.numel():
        return
    if d.dtype == BF16:
        _ = torch.mm(a, b.t(), out=d) if c is None else torch.addmm(c, a, b.t(), out=d)
        return
    wide = torch.mm(a.float(), b.float().t())
    d.copy_(wide if c is None else wide.add_(c))


def bf16_gemm_nn(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None, compiled_dims: str = "nk") -> None:
    """``d = c + a @ b`` with a [M, K], b [K, N]."""
    bf16_gemm_nt(a, b.mT, d, c, compiled_dims)


def bf16_gemm_tn(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None, compiled_dims: str = "mn") -> None:
    """``d = c + a.T @ b`` with a [K, M], b [K, N]."""
    bf16_gemm_nt(a.mT, b.mT, d, c, compiled_dims)


def bf16_gemm_tt(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None, compiled_dims: str = "mn") -> None:
    """``d = c + a.T @ b.T`` with a [K, M], b [N, K]."""
    bf16_gemm_nt(a.mT, b, d, c, compiled_dims)


def cublaslt_gemm_nt(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None) -> None:
    """``d = c + a @ b.T`` by torch, of bfloat16 numbers or of FP8 ones without scales, which bfloat16 holds exactly.

    Raises:
        DeepGemmError: Operands do not fit together.
    """
    fp8 = torch.float8_e4m3fn
    left, right = (x.to(BF16) if x.dtype == fp8 else x for x in (a, b))
    bf16_gemm_nt(left, right, d, c)


def cublaslt_gemm_nn(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None) -> None:
    """``d = c + a @ b`` by torch."""
    cublaslt_gemm_nt(a, b.mT, d, c)


def cublaslt_gemm_tn(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None) -> None:
    """``d = c + a.T @ b`` by torch."""
    cublaslt_gemm_nt(a.mT, b.mT, d, c)


def cublaslt_gemm_tt(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None) -> None:
    """``d = c + a.T @ b.T`` by torch."""
    cublaslt_gemm_nt(a.mT, b, d, c)


def m_grouped_bf16_gemm_nt_contiguous(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    grouped_layout: Tensor,
    compiled_dims: str = "nk",
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
) -> None:
    """Each row of a [M, K] times the matrix of its group, b [G, N, K], into d [M, N]; see the FP8 form.

    Raises:
        DeepGemmError: Operands do not fit together.
    """
    name = "m_grouped_bf16_gemm_nt_contiguous"
    matrix(name, "a", a, 2, BF16)
    need(k_major(a), name, "a must be K-major")
    matrix(name, "b", b, 3, BF16)
    (M, K), (G, N, K_b) = a.shape, b.shape
    need(K_b == K and bool(G and N and K), name, f"a {[M, K]} and b {[G, N, K_b]} differ in K, or are empty")
    result(name, d, (M, N), (BF16,))
    need(
        use_psum_layout or expected_m_for_psum_layout is None,
        name,
        "expected_m_for_psum_layout says something about the psum layout only",
    )
    check_layout(name, grouped_layout, G if use_psum_layout else M)
    if M:
        alignment = settings.get_mk_alignment_for_contiguous_layout()
        ops.grouped_gemm(a, b, grouped_layout, d, psum=use_psum_layout, alignment=alignment)


def m_grouped_bf16_gemm_nn_contiguous(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    grouped_layout: Tensor,
    compiled_dims: str = "nk",
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
) -> None:
    """The same for b [G, K, N]."""
    m_grouped_bf16_gemm_nt_contiguous(a, b.mT, d, grouped_layout, compiled_dims, use_psum_layout, ensure_zero_padding)


def m_grouped_bf16_gemm_nt_masked(
    a: Tensor, b: Tensor, d: Tensor, masked_m: Tensor, expected_m: int, compiled_dims: str = "nk"
) -> None:
    """The first masked_m[g] rows of a [G, M, K] times b [G, N, K], into d [G, M, N], whose other rows stay as they are.

    Raises:
        DeepGemmError: Operands do not fit together.
    """
    name = "m_grouped_bf16_gemm_nt_masked"
    for which, x in (("a", a), ("b", b)):
        matrix(name, which, x, 3, BF16)
        need(k_major(x), name, f"{which} must be K-major")
    (G, M, K), (G_b, N, K_b) = a.shape, b.shape
    need((G_b, K_b) == (G, K), name, f"a {[G, M, K]} and b {[G_b, N, K_b]} differ in groups or K")
    need(bool(G and M and N and K), name, f"nothing may be empty, got a {[G, M, K]} and b {[G_b, N, K_b]}")
    need(expected_m > 0, name, f"expected_m must be positive, got {expected_m}")
    result(name, d, (G, M, N), (BF16,))
    check_layout(name, masked_m, G)
    ops.masked_gemm(a, b, masked_m, d)


def k_grouped_bf16_gemm_tn_contiguous(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    ks_cpu: list[int] | None,
    grouped_layout: Tensor,
    c: Tensor | None = None,
    compiled_dims: str = "mn",
    use_psum_layout: bool = False,
) -> None:
    """``d[g] = c[g] + a_g.T @ b_g`` over stretches of rows of a [Σk, M] and b [Σk, N]; d float32 [G, M, N].

    Raises:
        DeepGemmError: Operands do not fit together.
        NotOnHopperError: `use_psum_layout` is asked for, or no `ks_cpu` given.
    """
    name = "k_grouped_bf16_gemm_tn_contiguous"
    if use_psum_layout or not ks_cpu:
        sm100_only(name, "a psum layout, or one without ks_cpu,")
    assert ks_cpu is not None
    for which, x in (("a", a), ("b", b)):
        matrix(name, which, x, 2, BF16)
        need(x.is_contiguous(), name, f"{which} must be contiguous")
    need(d.dim() == 3 and d.is_contiguous(), name, f"d must be contiguous [G, M, N], got {list(d.shape)}")
    G = d.shape[0]
    need(len(ks_cpu) == G, name, f"ks_cpu must have an entry for each of {G} groups, got {len(ks_cpu)}")
    check_layout(name, grouped_layout, G)
    alignment = settings.get_mk_alignment_for_contiguous_layout()
    need(alignment % 32 == 0, name, f"groups must be aligned to a multiple of 32 rows, got {alignment}")
    need(all(k % alignment == 0 for k in ks_cpu), name, f"every k must be a multiple of {alignment}, got {ks_cpu}")
    K = sum(ks_cpu)
    need(a.shape[0] == K == b.shape[0], name, f"a and b must have Σk = {K} rows, got {len(a)} and {len(b)}")
    need(c is not None, name, "c must be given: the product is added to it")
    result(name, d, (G, a.shape[1], b.shape[1]), (FP32,), c)
    if d.numel():
        ends = torch.tensor(ks_cpu, dtype=torch.int64).cumsum(0).to(torch.int32).to(d.device)
        ops.k_grouped_gemm(a, b, ends, c, d, alignment=alignment)
