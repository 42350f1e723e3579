"""FP8 blocks against plain loops: exact at edges that no block divides; what cannot be read is refused by name."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from nautile.checkpoint.compare import compare
from nautile.checkpoint.fp8 import Fp8Format, dequantize, is_quantized, quantize, read_quantization, scale_shape
from nautile.checkpoint.layout import Layout, Piece, Split
from nautile.checkpoint.load import load_into
from nautile.checkpoint.source import open_checkpoint
from nautile.core.errors import UserError

E4M3 = torch.float8_e4m3fn


def value_of(code: int) -> float:
    """e4m3fn by its definition: 1 sign, 4 exponent bits with bias 7, 3 mantissa bits; no infinity."""
    sign = -1.0 if code & 128 else 1.0
    exponent, mantissa = code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def naive_dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Element by element, its product rounded once to float32."""
    codes = weight.view(torch.uint8)
    out = torch.empty(weight.shape)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            factor = float(scale[i // block[0], j // block[1]])
            out[i, j] = torch.tensor(value_of(int(codes[i, j])) * factor, dtype=torch.float64).float()
    return out


def naive_quantize(weight: Tensor, block: tuple[int, int], powers: bool) -> tuple[Tensor, Tensor]:
    """Block by block; every element goes to the nearest of the 253 finite values, ties to the even code."""
    codes = [code for code in range(256) if not math.isnan(value_of(code)) and code != 128]
    table = torch.tensor([value_of(code) for code in codes], dtype=torch.float64)
    rows, columns = -(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1])
    out = torch.empty(weight.shape, dtype=torch.uint8)
    scale = torch.empty(rows, columns)
    for r in range(rows):
        for c in range(columns):
            at = slice(r * block[0], (r + 1) * block[0]), slice(c * block[1], (c + 1) * block[1])
            part = weight[at].float()
            most = float(part.abs().max())
            s = 1.0 if most == 0 else float(torch.tensor(most) / 448)
            if powers and most:
                s = 2.0 ** math.ceil(math.log2(s))
            scale[r, c] = s
            for i in range(part.shape[0]):
                for j in range(part.shape[1]):
                    x = float(part[i, j] / torch.tensor(s))
                    distance = (table - x).abs()
                    near = [codes[k] for k in (distance == distance.min()).nonzero().flatten().tolist()]
                    code = near[0] if len(near) == 1 else next(k for k in near if k % 2 == 0)
                    sign = 128 if code == 0 and math.copysign(1, x) < 0 else 0
                    out[at[0].start + i, at[1].start + j] = code | sign
    return out.view(E4M3), scale


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


BLOCKS = st.tuples(st.integers(1, 6), st.integers(1, 6))
SIZES = st.tuples(st.integers(1, 14), st.integers(1, 14))


def test_all_codes_dequantise_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3).reshape(16, 16)
    scale = torch.tensor([[1.0, 3e-5], [7.3, 2.0**-140]])
    assert torch.equal(
        dequantize(codes, scale, (9, 9)).nan_to_num(-1), naive_dequantize(codes, scale, (9, 9)).nan_to_num(-1)
    )
    assert dequantize(codes, scale, (9, 9)).isnan().sum() == 2


@settings(max_examples=60, deadline=None)
@given(size=SIZES, block=BLOCKS, seed=st.integers(0, 999), data=st.data())
def test_dequantise_equals_a_loop_also_on_some_of_the_rows(size, block, seed, data) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 255, size, generator=generator)
    weight = codes.where(codes != 127, 0).to(torch.uint8).view(E4M3)  # 127 and 255 are NaN
    scale = torch.rand(scale_shape(size, block), generator=generator) / 100
    want = naive_dequantize(weight, scale, block)
    assert torch.equal(dequantize(weight, scale, block), want)
    start = data.draw(st.integers(0, size[0]))
    stop = data.draw(st.integers(start, size[0]))
    assert torch.equal(dequantize(weight[start:stop], scale, block, start), want[start:stop])


@settings(max_examples=40, deadline=None)
@given(size=SIZES, block=BLOCKS, seed=st.integers(0, 999), powers=st.booleans(), bf16=st.booleans())
def test_quantise_equals_a_loop(size, block, seed, powers: bool, bf16: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, generator=generator) * 10 ** (4 * torch.rand(size, generator=generator) - 4)
    weight[torch.rand(size, generator=generator) < 0.2] = 0
    weight = weight.bfloat16() if bf16 else weight
    codes, scale = quantize(weight, block, "ue8m0" if powers else None)
    want_codes, want_scale = naive_quantize(weight, block, powers)
    assert same(scale, want_scale) and same(codes, want_codes)


@settings(max_examples=60, deadline=None)
@given(size=SIZES, block=BLOCKS, seed=st.integers(0, 999))
def test_what_was_quantised_once_stays_as_it_is(size, block, seed) -> None:
    """Powers of two: the numbers are the same bit for bit. Other scales can move by their own last bit, codes not."""
    weight = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    once = dequantize(*quantize(weight, block, "ue8m0"), block)
    assert torch.equal(dequantize(*quantize(once, block, "ue8m0"), block), once)
    codes, scale = quantize(weight, block)
    codes_again, scale_again = quantize(dequantize(codes, scale, block), block)
    assert same(codes, codes_again)
    torch.testing.assert_close(scale_again, scale, rtol=2**-22, atol=0)


def test_extremes_neither_overflow_nor_turn_into_nan() -> None:
    weight = torch.zeros(4, 8)
    weight[:2, :2] = torch.tensor([[3.4e38, -1e30], [1e-38, 0.0]])
    weight[:2, 2:4] = 1e-45  # the smallest float32
    weight[2:, 4:6] = torch.tensor(-0.0)
    for scale_fmt in (None, "ue8m0"):
        codes, scale = quantize(weight, (2, 2), scale_fmt)
        assert scale.isfinite().all() and (scale > 0).all() and scale[1, 0] == 1
        assert codes.float().isfinite().all() and codes.float().abs().max() <= 448
        if scale_fmt:
            assert (torch.frexp(scale).mantissa == 0.5).all()


def test_a_scale_of_exactly_a_power_of_two_is_not_doubled() -> None:
    for exponent in (-20, 0, 7):
        codes, scale = quantize(torch.full((1, 1), 448 * 2.0**exponent), scale_fmt="ue8m0")
        assert scale.item() == 2.0**exponent and codes.float().item() == 448


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_no_scale_can_represent_is_named(bad: float) -> None:
    weight = torch.ones(300, 200)
    weight[290, 150] = bad
    with pytest.raises(UserError, match=r"layers\.3\.x holds NaN or infinity, in rows 256 to 299"):
        quantize(weight, name="layers.3.x")


def test_empty_and_transposed_weights() -> None:
    assert [tuple(t.shape) for t in quantize(torch.empty(0, 5))] == [(0, 5), (0, 1)]
    assert [tuple(t.shape) for t in quantize(torch.empty(5, 0))] == [(5, 0), (1, 0)]
    weight = torch.randn(5, 7)
    before = weight.clone()
    assert same(quantize(weight.t(), (2, 2))[0], quantize(weight.t().contiguous(), (2, 2))[0])
    assert torch.equal(weight, before)  # not scaled in place


@pytest.mark.parametrize(
    ("name", "quantised"),
    [
        ("model.layers.0.self_attn.q_proj.weight", True),
        ("model.layers.0.self_attn.q_a_proj.weight", True),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", True),
        ("model.layers.3.mlp.experts.17.down_proj.weight", True),
        ("model.layers.61.mlp.shared_experts.gate_proj.weight", True),
        ("model.layers.0.self_attn.indexer.wq_b.weight", True),
        ("model.layers.0.self_attn.indexer.wk.weight", True),
        ("model.layers.0.self_attn.indexer.weights_proj.weight", False),
        ("model.layers.0.self_attn.indexer.k_norm.weight", False),
        ("model.layers.61.eh_proj.weight", False),
        ("model.layers.61.embed_tokens.weight", False),
        ("model.layers.61.shared_head.head.weight", False),
        ("model.layers.3.mlp.gate.weight", False),
        ("model.layers.3.input_layernorm.weight", False),
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
        ("model.layers.0.self_attn.q_proj.bias", False),
    ],
)
def test_which_published_weights_are_fp8(name: str, quantised: bool) -> None:
    assert is_quantized(name, (256, 256)) == quantised
    assert not is_quantized(name, (256,))


def test_published_sizes_of_scales() -> None:
    assert scale_shape((576, 7168)) == (5, 56)
    assert scale_shape((144, 96)) == (2, 1)
    assert scale_shape((8192, 1536)) == (64, 12)


def test_quantisation_in_both_spellings_comes_back() -> None:
    for made in (Fp8Format(), Fp8Format((64, 32), "ue8m0")):
        assert read_quantization({"quantization_config": made.to_hf()}, "c") == made
    theirs = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
    assert read_quantization({"quantization_config": theirs}, "c") == Fp8Format()
    assert read_quantization({}, "c") is None and read_quantization({"quantization_config": None}, "c") is None


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"quant_method": "awq", "bits": 4}, "quantised with awq"),
        ({"quant_method": "gptq"}, "quantised with gptq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised with bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "quantised with compressed-tensors"),
        ({"quant_method": "mxfp4"}, "quantised with mxfp4"),
        ({"bits": 4}, "quantised with an unnamed method"),
        ({"quant_method": "fp8"}, "weight_block_size None, not with a scale per block"),
        ({"quant_method": "fp8", "weight_block_size": None}, "weight_block_size None"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": "128"}, "weight_block_size"),
        ({"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]}, "FP8 of format e5m2"),
        ({"quant_method": "fp8", "scale_fmt": "e5m3", "weight_block_size": [1, 1]}, "scales of format e5m3"),
        ("int8", "quantization_config is 'int8'"),
    ],
)
def test_other_methods_are_named_with_what_would_work(entry, said: str, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": entry}))
    with pytest.raises(UserError, match=f"(?s){said}.*nautile reads float32.*FP8 .e4m3. with a scale per block"):
        open_checkpoint(tmp_path)


# --- in a folder ----------------------------------------------------------------------------------------------------


DEFAULT = Fp8Format()


def fp8_folder(folder: Path, tensors: dict[str, Tensor], quantization: Fp8Format | None = DEFAULT) -> None:
    save_file(tensors, folder / "model.safetensors")
    config = {"quantization_config": quantization.to_hf()} if quantization else {}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("rows", [576, 144, 128, 100])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_projections_that_no_block_divides(rows: int, scale_dtype: torch.dtype, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("nautile.checkpoint.source._TILE", 200 * 50)
    codes, scale = quantize(torch.randn(rows, 200), scale_fmt="ue8m0")
    fp8_folder(tmp_path, {"p.weight": codes, "p.weight_scale_inv": scale.to(scale_dtype), "q": torch.ones(2)})
    want = naive_dequantize(codes[:, ::50], scale.repeat_interleave(3, 1)[:, :4], (128, 1)) if rows == 144 else None
    with open_checkpoint(tmp_path) as checkpoint:
        assert sorted(checkpoint.weight_names()) == ["p.weight", "q"]
        whole = checkpoint.weight("p.weight")
        assert whole.dtype == torch.float32 and torch.equal(whole, dequantize(codes, scale))
        assert want is None or torch.equal(whole[:, [0, 50, 100]], want[:, :3])
        half = torch.empty(60, 200, dtype=torch.bfloat16)
        assert checkpoint.weight("p.weight", half, slice(35, 95)) is half
        assert torch.equal(half, whole[35:95].bfloat16())
        assert same(checkpoint.stored("p.weight"), codes)
        wide = torch.empty(200, rows).t()
        assert torch.equal(checkpoint.weight("p.weight", wide), whole)


def test_the_block_size_comes_from_the_configuration_not_from_the_grid(tmp_path: Path) -> None:
    """144 rows and two block rows: 72 rows per block fit the grid just as well, and are wrong."""
    codes, scale = quantize(torch.randn(144, 130) * torch.arange(1, 145)[:, None])
    fp8_folder(tmp_path, {"weight": codes, "weight_scale_inv": scale})
    with open_checkpoint(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.weight("weight"), naive_dequantize(codes, scale, (128, 128)))
        assert not torch.equal(checkpoint.weight("weight"), naive_dequantize(codes, scale, (72, 65)))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.empty(2, 300, 70))
        self.norm = nn.Parameter(torch.empty(70))


STACK = Layout(
    splits=[
        Split(
            "experts",
            lambda match, _: [
                Piece(f"e.{i}.{n}", (i, slice(n * 150, n * 150 + 150))) for i in range(2) for n in range(2)
            ],
        )
    ]
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stacked_pieces_are_dequantised_into_their_places(dtype: torch.dtype, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("nautile.checkpoint.load._JOB", 70 * 40)
    weights = {f"e.{i}.{n}": torch.randn(150, 70) for i in range(2) for n in range(2)}
    tensors = {"norm": torch.randn(70)}
    for name, weight in weights.items():
        tensors[name], tensors[f"{name}_scale_inv"] = quantize(weight)
    fp8_folder(tmp_path, tensors)
    model = Stack().to(dtype)
    with open_checkpoint(tmp_path) as checkpoint:
        load_into(model, checkpoint, STACK)
    for i in range(2):
        want = torch.cat([dequantize(tensors[f"e.{i}.{n}"], tensors[f"e.{i}.{n}_scale_inv"]) for n in range(2)])
        assert torch.equal(model.experts[i], want.to(dtype))
    assert torch.equal(model.norm, tensors["norm"].to(dtype))


CODES, SCALE = quantize(torch.ones(300, 200))


@pytest.mark.parametrize(
    ("tensors", "quantization", "said"),
    [
        ({"weight": CODES}, Fp8Format(), "weight is FP8 and has no weight_scale_inv"),
        ({"weight": CODES, "weight_scale_inv": SCALE}, None, "has no quantization_config"),
        (
            {"weight": CODES, "weight_scale_inv": torch.ones(2, 2)},
            Fp8Format(),
            r"weight_scale_inv is \[2, 2\], not \[3, 2\]: weight is \[300, 200\] in blocks of 128 × 128",
        ),
        ({"weight": CODES, "weight_scale_inv": torch.ones(())}, Fp8Format(), r"is \[\], not \[3, 2\]"),
        ({"weight": CODES, "weight_scale_inv": SCALE.int()}, Fp8Format(), "weight_scale_inv is int32"),
        ({"weight": CODES.float(), "weight_scale_inv": SCALE}, Fp8Format(), "weight has scales but is float32"),
    ],
)
def test_scales_that_do_not_fit_are_a_wrong_dtype(tensors, quantization, said: str, tmp_path: Path) -> None:
    fp8_folder(tmp_path, tensors, quantization)
    model = nn.Linear(200, 300, bias=False, device="meta")
    with open_checkpoint(tmp_path) as checkpoint:
        comparison = compare(model, checkpoint, Layout())
        assert len(comparison.wrong_dtype) == 1 and not comparison.fits
        with pytest.raises(UserError, match=f"(?s)do not fit config.json.*{said}"):
            load_into(model, checkpoint, Layout())
        with pytest.raises(UserError, match=said):
            checkpoint.weight("weight")


def test_scales_without_a_weight_are_unexpected(tmp_path: Path) -> None:
    fp8_folder(tmp_path, {"weight": torch.ones(300, 200), "other.weight_scale_inv": SCALE})
    with open_checkpoint(tmp_path) as checkpoint:
        comparison = compare(nn.Linear(200, 300, bias=False, device="meta"), checkpoint, Layout())
    assert comparison.unexpected == ["other.weight_scale_inv"]
