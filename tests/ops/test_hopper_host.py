"""What Python does around the Hopper kernels, with the emulator in the GPU's place: the public ops, end to end."""

import ctypes

import pytest
import torch
from hopper_cases import operand
from hopper_emulation import run_fp8_gemm, run_mla_decode
from torch import Tensor

from nautile.core.cuda_driver import Launch
from nautile.core.jit import why_no_cxx
from nautile.ops.fp8_tensor import Fp8Tensor
from nautile.ops.hopper import fp8_products, mla_plan, paged_latents
from nautile.ops.hopper.fp8_plan import Plan, movable
from nautile.ops.numerics import MLA_DENSE_OUT, MLA_LSE, SAME_FP8_DIFF, calc_diff, within
from nautile.ops.reference import fp8_products as reference
from nautile.ops.reference import paged_latents as paged_reference

pytestmark = pytest.mark.skipif(why_no_cxx() is not None, reason=str(why_no_cxx()))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The products that were started, each one emulated."""
    plans: list[Plan] = []

    def launch(what: Plan, device: torch.device) -> None:
        plans.append(what)
        run_fp8_gemm(what)

    monkeypatch.setattr(fp8_products, "launch", launch)
    monkeypatch.setattr(fp8_products, "multiprocessors", lambda device: 4)
    return plans


def strided(x: Fp8Tensor) -> Fp8Tensor:
    """The same numbers in memory that the copy engine cannot address: K is not the contiguous dim."""
    data = x.data.view(torch.uint8).t().contiguous().t().view(torch.float8_e4m3fn)
    return Fp8Tensor(data, x.scale.t().contiguous().t(), x.block)


def test_any_strides_of_operands_result_and_addend(launched: list[Plan]) -> None:
    a, b = operand(20, 256), operand(50, 256, block=(128, 128))
    c = torch.randn(50, 20).t()
    want = reference.fp8_gemm(a, b, c.clone(), torch.empty(20, 50))
    got = fp8_products.fp8_gemm(strided(a), strided(b), c, c)
    assert got is c and calc_diff(got, want) < SAME_FP8_DIFF
    assert len(launched) == 1


def test_the_tile_is_stored_in_one_piece_where_memory_allows(launched: list[Plan]) -> None:
    a, b = operand(20, 128), operand(48, 128, block=(128, 128))
    want = reference.fp8_gemm(a, b, None, torch.empty(20, 48)).bfloat16()
    for out in (torch.empty(20, 48), torch.empty(20, 51)[:, :48], torch.empty(20, 49)[:, 1:]):
        got = fp8_products.fp8_gemm(a, b, None, torch.empty_strided(out.shape, out.stride(), dtype=torch.bfloat16))
        assert calc_diff(got, want) < SAME_FP8_DIFF
    assert [plan.variant.tile_store for plan in launched] == [True, False, False]


@pytest.mark.parametrize("M, N, K", [(0, 48, 128), (20, 0, 128), (20, 48, 0)])
def test_products_without_elements_start_nothing(M: int, N: int, K: int, launched: list[Plan]) -> None:
    a, b, c = operand(M, K), operand(N, K, block=(128, 128)), torch.randn(M, N)
    assert torch.equal(fp8_products.fp8_gemm(a, b, c, torch.empty(M, N)), c)
    assert not fp8_products.fp8_gemm(a, b, None, torch.empty(M, N)).any()
    assert not launched


def test_no_k_leaves_rows_that_do_not_count_alone(launched: list[Plan]) -> None:
    a, b = operand(2, 3, 0), operand(2, 5, 0)
    out = fp8_products.masked_fp8_gemm(a, b, torch.tensor([1, 3], dtype=torch.int32), torch.full((2, 3, 5), 7.0))
    assert not out[0, :1].any() and (out[0, 1:] == 7).all() and not out[1].any()


def test_what_the_copy_engine_can_address_is_not_copied() -> None:
    x = torch.zeros(4, 64, 256, dtype=torch.uint8)
    for fine in (x, x[1:3], x[:, 5:9], x[..., 16:80], x[:, :1], x[0]):
        assert movable(fine) is fine
    backwards, repeated = x.transpose(0, 1), x[:1].expand(3, 64, 256)
    for copied in (x[..., 1:65], x[..., :100], x[..., ::2], x.transpose(0, 2), backwards, repeated):
        assert movable(copied) is not copied
    odd = torch.zeros(8 * 128 + 1, dtype=torch.uint8)[1:].view(8, 128)
    assert movable(odd).data_ptr() % 16 == 0 and movable(odd) is not odd


def test_dense_decoding_makes_its_schedule_and_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[mla_plan.Plan] = []

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name = name

        def launch(self, how: Launch, stream: int, arguments: tuple[ctypes.Structure, ...]) -> None:
            assert how == (plans[-1].how if self.name == mla_plan.KERNEL else plans[-1].how_to_merge)
            if self.name == mla_plan.MERGE:
                run_mla_decode(plans[-1])

    def remember(*given: object) -> mla_plan.Plan:
        plans.append(mla_plan.plan(*given))  # pyrefly: ignore
        return plans[-1]

    class Stream:
        cuda_stream = 0

    monkeypatch.setattr(paged_latents, "plan", remember)
    monkeypatch.setattr(paged_latents, "encode", lambda tensor_map: tensor_map)
    monkeypatch.setattr(paged_latents, "multiprocessors", lambda device: 3)
    monkeypatch.setattr(paged_latents, "_kernels", lambda device: (Recorded("mla_decode"), Recorded("mla_merge")))
    monkeypatch.setattr(paged_latents, "bind", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    q = torch.randn(2, 9, 2, 576).mul(16).bfloat16().transpose(1, 2)
    cache = (torch.randn(8, 64, 1, 640) / 10).bfloat16()[..., :576]
    table = torch.randperm(8, dtype=torch.int32).view(4, 2).t()
    lengths = torch.tensor([200, 37], dtype=torch.int32)
    given: tuple[Tensor | float | bool | None, ...] = (q, cache, table, lengths, 512, 0.04, True, None)
    o, lse = paged_latents.paged_mla_decode(*given)  # pyrefly: ignore
    want, want_lse = paged_reference.paged_mla_decode(*given)  # pyrefly: ignore
    assert within(o, want, MLA_DENSE_OUT) is None
    assert within(lse, want_lse, MLA_LSE) is None
    assert len(plans) == 1
