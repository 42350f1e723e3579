"""DeepGEMM's FP8 products ``D = C + A @ B`` on `nautile.ops`: dense, grouped by rows, masked, grouped by columns.

The last two letters of a name say how A and B lie: n as in mathematics, t transposed. ``nt`` is A [M, K] and B [N, K].
All write into `d` and return nothing. `compiled_dims` and `expected_m` only steer DeepGEMM's compiler and are checked
for nothing here. On SM90 a bfloat16 result takes no C; a float32 one is accumulated in place, with recipe (1, 1, 128).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from nautile import ops
from nautile.compat.deep_gemm import settings
from nautile.compat.deep_gemm.errors import need, sm100_only
from nautile.compat.deep_gemm.operands import Granularity, Pair, Recipe, fp8, recipes, result, transposed
from nautile.ops.fp8_tensor import Fp8Tensor

BF16, FP32 = torch.bfloat16, torch.float32


def fp8_fp4_gemm_nt(
    a: Pair,
    b: Pair,
    d: Tensor,
    c: Tensor | None = None,
    recipe: Recipe | None = None,
    recipe_a: Granularity | None = None,
    recipe_b: Granularity | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """``d = c + a @ b.T`` with a [M, K], b [N, K].

    Args:
        a: float8_e4m3fn data and float32 scales [M, ⌈K / 128⌉].
        b: Data, and scales [⌈N / 128⌉, ⌈K / 128⌉], or [N, ⌈K / 128⌉] with a recipe of one row.
        d: [M, N], written. bfloat16; float32 with a recipe of one row for b, and then `c` must be given.
        c: What to add, such as `d` itself.
        recipe: (rows of a, rows of b, columns) that share a scale; (1, 128, 128) if nothing is said.
        recipe_a: (rows, columns) that share a scale in a; together with `recipe_b`, instead of `recipe`.
        recipe_b: The same of b.
        compiled_dims: Has no effect.
        disable_ue8m0_cast: Has no effect: scales are never cast on SM90.

    Raises:
        DeepGemmError: Operands do not fit together.
        NotOnHopperError: They are of a kind that SM90 kernels do not take.
    """
    name = "fp8_gemm_nt"
    grain_a, grain_b = recipes(name, recipe, recipe_a, recipe_b)
    left, right = fp8(name, "a", a, grain_a, 2), fp8(name, "b", b, grain_b, 2)
    need(left.shape[1] == right.shape[1], name, f"a {list(left.shape)} and b {list(right.shape)} differ in K")
    result(name, d, (left.shape[0], right.shape[0]), (BF16, FP32), c)
    if not d.numel():
        return
    if not left.shape[1]:
        _ = d.zero_() if c is None else d.copy_(c)
        return
    if grain_b[0] == 1:
        got = f"d {d.dtype} and c {None if c is None else c.dtype}"
        need(c is not None and d.dtype == FP32, name, f"a recipe of one row adds to a float32 c, got {got}")
    else:
        need(d.dtype == BF16, name, f"d must be bfloat16 with a recipe of {grain_b[0]} rows, got {d.dtype}")
        if c is not None:
            sm100_only(name, "adding to a bfloat16 c")
    ops.fp8_gemm(filled(left), filled(right), c, d)


def fp8_fp4_gemm_nn(
    a: Pair,
    b: Pair,
    d: Tensor,
    c: Tensor | None = None,
    recipe: Recipe | None = None,
    recipe_a: Granularity | None = None,
    recipe_b: Granularity | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """``d = c + a @ b`` with a [M, K] and b [K, N], which must be the transpose of a contiguous [N, K]."""
    fp8_fp4_gemm_nt(a, transposed(b), d, c, recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast)


def fp8_fp4_gemm_tn(
    a: Pair,
    b: Pair,
    d: Tensor,
    c: Tensor | None = None,
    recipe: Recipe | None = None,
    recipe_a: Granularity | None = None,
    recipe_b: Granularity | None = None,
    compiled_dims: str = "mn",
    disable_ue8m0_cast: bool = False,
) -> None:
    """``d = c + a.T @ b`` with a [K, M] and b [K, N], transposes of contiguous matrices."""
    fp8_fp4_gemm_nt(transposed(a), transposed(b), d, c, recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast)


def fp8_fp4_gemm_tt(
    a: Pair,
    b: Pair,
    d: Tensor,
    c: Tensor | None = None,
    recipe: Recipe | None = None,
    recipe_a: Granularity | None = None,
    recipe_b: Granularity | None = None,
    compiled_dims: str = "mn",
    disable_ue8m0_cast: bool = False,
) -> None:
    """``d = c + a.T @ b.T`` with a [K, M], the transpose of a contiguous [M, K], and b [N, K]."""
    fp8_fp4_gemm_nt(transposed(a), b, d, c, recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast)


def m_grouped_fp8_fp4_gemm_nt_contiguous(
    a: Pair,
    b: Pair,
    d: Tensor,
    grouped_layout: Tensor,
    recipe: Recipe | None = None,
    recipe_a: Granularity | None = None,
    recipe_b: Granularity | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
) -> None:
    """Each row of a [M, K] times the matrix of its group, b [G, N, K], into d [M, N].

    Args:
        a: Data and scales [M, ⌈K / 128⌉].
        b: Data and scales [G, ⌈N / 128⌉, ⌈K / 128⌉].
        d: bfloat16, written; 0 in padding rows.
        grouped_layout: int32 [M], the group of each row, −1 for padding; with `use_psum_layout` int32 [G], the end of
            each group. Groups begin at multiples of `get_mk_alignment_for_contiguous_layout()`.
        recipe: As in `fp8_gemm_nt`.
        recipe_a: As in `fp8_gemm_nt`.
        recipe_b: As in `fp8_gemm_nt`.
        compiled_dims: Has no effect.
        disable_ue8m0_cast: Has no effect.
        use_psum_layout: What `grouped_layout` is.
        ensure_zero_padding: Has no effect: padding rows of `d` are always zeros.
        expected_m_for_psum_layout: Has no effect; may be given with `use_psum_layout` only.

    Raises:
        DeepGemmError: Operands do not fit together.
        NotOnHopperError: They are of a kind that SM90 kernels do not take.
    """
    name = "m_grouped_fp8_gemm_nt_contiguous"
    grain_a, grain_b = recipes(name, recipe, recipe_a, recipe_b)
    left, right = fp8(name, "a", a, grain_a, 2), fp8(name, "b", b, grain_b, 3)
    (M, K), (G, N, K_b) = left.shape, right.shape
    need(K_b == K, name, f"a {[M, K]} and b {[G, N, K_b]} differ in K")
    need(bool(G and N and K), name, f"b must not be empty, got {[G, N, K]}")
    result(name, d, (M, N), (BF16,))
    need(
        use_psum_layout or expected_m_for_psum_layout is None,
        name,
        "expected_m_for_psum_layout says something about the psum layout only",
    )
    check_layout(name, grouped_layout, G if use_psum_layout else M)
    if M:
        alignment = settings.get_mk_alignment_for_contiguous_layout()
        ops.grouped_fp8_gemm(filled(left), filled(right), grouped_layout, d, psum=use_psum_layout, alignment=alignment)


def m_grouped_fp8_fp4_gemm_nn_contiguous(
    a: Pair,
    b: Pair,
    d: Tensor,
    grouped_layout: Tensor,
    recipe: Recipe | None = None,
    recipe_a: Granularity | None = None,
    recipe_b: Granularity | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
) -> None:
    """The same for b [G, K, N], transposes of contiguous [N, K]."""
    m_grouped_fp8_fp4_gemm_nt_contiguous(
        a,
        transposed(b),
        d,
        grouped_layout,
        recipe,
        recipe_a,
        recipe_b,
        compiled_dims,
        disable_ue8m0_cast,
        use_psum_layout,
        ensure_zero_padding,
    )


def m_grouped_fp8_fp4_gemm_nt_masked(
    a: Pair,
    b: Pair,
    d: Tensor,
    masked_m: Tensor,
    expected_m: int,
    recipe: Recipe | None = None,
    recipe_a: Granularity | None = None,
    recipe_b: Granularity | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """The first masked_m[g] rows of a [G, M, K] times b [G, N, K], into d [G, M, N], whose other rows stay as they are.

    Args:
        a: Data and scales [G, M, ⌈K / 128⌉].
        b: Data and scales [G, ⌈N / 128⌉, ⌈K / 128⌉].
        d: bfloat16, written.
        masked_m: int32 [G].
        expected_m: How many rows a group has about; positive, without effect on the result.
        recipe: As in `fp8_gemm_nt`.
        recipe_a: As in `fp8_gemm_nt`.
        recipe_b: As in `fp8_gemm_nt`.
        compiled_dims: Has no effect.
        disable_ue8m0_cast: Has no effect.

    Raises:
        DeepGemmError: Operands do not fit together.
        NotOnHopperError: They are of a kind that SM90 kernels do not take.
    """
    name = "m_grouped_fp8_gemm_nt_masked"
    grain_a, grain_b = recipes(name, recipe, recipe_a, recipe_b)
    left, right = fp8(name, "a", a, grain_a, 3), fp8(name, "b", b, grain_b, 3)
    (G, M, K), (G_b, N, K_b) = left.shape, right.shape
    need((G_b, K_b) == (G, K), name, f"a {[G, M, K]} and b {[G_b, N, K_b]} differ in groups or K")
    need(bool(G and M and N and K), name, f"nothing may be empty, got a {[G, M, K]} and b {[G_b, N, K_b]}")
    need(expected_m > 0, name, f"expected_m must be positive, got {expected_m}")
    result(name, d, (G, M, N), (BF16,))
    check_layout(name, masked_m, G)
    ops.masked_fp8_gemm(filled(left), filled(right), masked_m, d)


def k_grouped_fp8_gemm_nt_contiguous(
    a: Pair,
    b: Pair,
    d: Tensor,
    ks_cpu: list[int] | None,
    grouped_layout: Tensor,
    c: Tensor | None = None,
    recipe: Recipe = (1, 1, 128),
    compiled_dims: str = "mn",
    use_psum_layout: bool = False,
) -> None:
    """``d[g] = c[g] + a_g @ b_g.T`` with a_g [M, k_g], b_g [N, k_g]: gradients of a stack of weights.

    Args:
        a: Data, flat: the matrices [M, k_g] one after another, each contiguous; scales [M, Σ k_g / 128].
        b: The same with [N, k_g].
        d: float32 [G, M, N], contiguous, written.
        ks_cpu: The k_g, multiples of 128.
        grouped_layout: The k_g as int32 [G].
        c: What to add, such as `d` itself; must be given.
        recipe: Must be (1, 1, 128).
        compiled_dims: Has no effect.
        use_psum_layout: Must be False on SM90.

    Raises:
        DeepGemmError: Operands do not fit together.
        NotOnHopperError: `use_psum_layout` is asked for.
    """
    name = "k_grouped_fp8_gemm_nt_contiguous"
    need(tuple(recipe) == (1, 1, 128), name, f"the recipe must be (1, 1, 128), got {recipe}")
    if use_psum_layout or not ks_cpu:
        sm100_only(name, "a psum layout, or one without ks_cpu,")
    assert ks_cpu is not None
    need(d.dim() == 3, name, f"d must be [G, M, N], got {list(d.shape)}")
    G, M, N = d.shape
    need(len(ks_cpu) == G, name, f"ks_cpu must have an entry for each of {G} groups, got {len(ks_cpu)}")
    check_layout(name, grouped_layout, G)
    need(all(k >= 0 and k % 128 == 0 for k in ks_cpu), name, f"every k must be a multiple of 128, got {ks_cpu}")
    need(c is not None, name, "c must be given: the product is added to it")
    result(name, d, (G, M, N), (FP32,), c)
    K = sum(ks_cpu)
    for which, (data, scale), rows in (("a", a, M), ("b", b, N)):
        need(data.dtype == torch.float8_e4m3fn, name, f"{which} must be float8_e4m3fn, got {data.dtype}")
        need(data.is_contiguous(), name, f"{which} must be contiguous")
        need(data.numel() == rows * K, name, f"{which} must hold {rows} x {K} numbers, got {data.numel()}")
        need(
            scale.dtype == FP32 and list(scale.shape) == [rows, K // 128],
            name,
            f"scales of {which} must be float32 {[rows, K // 128]}, got {scale.dtype} {list(scale.shape)}",
        )
    start = 0
    for g, k in enumerate(ks_cpu):
        left, right = (_stretch(pair, rows, start, k) for pair, rows in ((a, M), (b, N)))
        assert c is not None
        if k:
            ops.fp8_gemm(left, right, c[g], d[g])
        elif c.data_ptr() != d.data_ptr():
            d[g].copy_(c[g])
        start += k


def k_grouped_fp8_gemm_tn_contiguous(
    a: Pair,
    b: Pair,
    d: Tensor,
    ks_cpu: list[int] | None,
    grouped_layout: Tensor,
    c: Tensor | None = None,
    recipe: Recipe = (1, 1, 128),
    compiled_dims: str = "mn",
    use_psum_layout: bool = False,
) -> None:
    """Only on SM100; on SM90 use `k_grouped_fp8_gemm_nt_contiguous`.

    Raises:
        NotOnHopperError: Always.
    """
    sm100_only("k_grouped_fp8_gemm_tn_contiguous", "an FP8 product over rows")


def fp8_gemm_nt_skip_head_mid(
    a: Pair,
    b: Pair,
    d: Tensor,
    head_splits: tuple[int, int, int],
    recipe: Recipe | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """``a @ b.T``, its columns spread over heads with a gap: (left, right) of the product into (left, gap, right) of d.

    What stands in the gaps of `d` stays. (MLA's kv_b projection writes keys whose rotated part comes from elsewhere.)

    Args:
        a: As in `fp8_gemm_nt`.
        b: As in `fp8_gemm_nt`; N is a multiple of left + right.
        d: bfloat16 [M, N / (left + right) · (left + gap + right)].
        head_splits: (left, gap, right).
        recipe: As in `fp8_gemm_nt`.
        compiled_dims: Has no effect.
        disable_ue8m0_cast: Has no effect.

    Raises:
        DeepGemmError: Operands do not fit together.
    """
    name = "fp8_gemm_nt_skip_head_mid"
    left, gap, right = head_splits
    M, N = a[0].shape[0], b[0].shape[0]
    fits = left + right > 0 and N % (left + right) == 0
    need(fits, name, f"N = {N} must be a multiple of left + right = {left + right}")
    heads = N // (left + right)
    result(name, d, (M, heads * (left + gap + right)), (BF16,))
    product = d.new_empty(M, N)
    fp8_fp4_gemm_nt(a, b, product, recipe=recipe)
    into, rows = d.unflatten(1, (heads, -1)), product.unflatten(1, (heads, -1))
    into[..., :left] = rows[..., :left]
    into[..., left + gap :] = rows[..., left:]


def filled(x: Fp8Tensor) -> Fp8Tensor:
    """`x` with zeros after its last column, up to a multiple of 128, which adds nothing to a product."""
    short = -x.shape[-1] % 128
    if not short:
        return x
    data = F.pad(x.data.view(torch.uint8), (0, short)).view(torch.float8_e4m3fn)
    return Fp8Tensor(data, x.scale, x.block)


def check_layout(function: str, layout: Tensor, length: int) -> None:
    """Raise unless `layout` is int32 [length], contiguous."""
    fits = layout.dtype == torch.int32 and list(layout.shape) == [length] and layout.is_contiguous()
    need(
        fits,
        function,
        f"the layout of groups must be contiguous int32 [{length}], got {layout.dtype} {list(layout.shape)}",
    )


def _stretch(pair: Pair, rows: int, start: int, k: int) -> Fp8Tensor:
    """One group's matrix [rows, k] of a flat concatenation."""
    data = pair[0].flatten()[start * rows : (start + k) * rows].view(rows, k)
    return Fp8Tensor(data, pair[1][:, start // 128 : (start + k) // 128], (1, 128))
