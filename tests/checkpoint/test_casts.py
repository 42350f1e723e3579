"""No finite number becomes infinity without a word, whatever reads it: loading, converting, any file format."""

import convert_cases as cases
import pytest
import torch
from safetensors.torch import save_file

import nautile
from nautile.checkpoint.casts import cast_into
from nautile.checkpoint.convert.options import Options
from nautile.checkpoint.convert.run import convert
from nautile.checkpoint.fp8 import SCALE
from nautile.checkpoint.source import open_checkpoint
from nautile.core.errors import UserError
from nautile.models.deepseek_v3.config import V3_NANO
from nautile.models.family import build_model

EDGE = {
    # dtype → (the largest that rounds into it, the smallest that does not), in float64
    torch.float16: (65519.99, 65520.0),
    torch.bfloat16: (2.0**128 - 2.0**119 - 2.0**104, 2.0**128 - 2.0**119),
    torch.float32: (2.0**128 - 2.0**103 - 2.0**76, 2.0**128 - 2.0**103),
}
NARROWING = [
    (stored, wanted)
    for wanted, wider in {
        torch.float16: (torch.bfloat16, torch.float32, torch.float64),
        torch.bfloat16: (torch.float32, torch.float64),
        torch.float32: (torch.float64,),
    }.items()
    for stored in wider
]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("stored", "wanted"), NARROWING)
def test_the_edge_is_where_rounding_gives_infinity(stored, wanted, sign):
    """Negative ones, too, in a column slice, beside numbers that are infinite or NaN in the file."""
    fits, lost = (torch.tensor(sign * value, dtype=torch.float64).to(stored) for value in EDGE[wanted])
    values = torch.tensor([[0.5, torch.inf, 1.0], [torch.nan, -torch.inf, -0.0]]).to(stored)
    out = torch.zeros(2, 6, dtype=wanted)[:, ::2]
    if torch.isfinite(fits.to(wanted)):  # of few digits, the lower edge may itself round up
        values[0, 2] = fits
    cast_into(out, values, "x")
    assert torch.equal(out.isnan(), values.isnan()) and torch.equal(out.nan_to_num(7), values.to(wanted).nan_to_num(7))
    values[1, 2] = lost
    assert not torch.isfinite(lost.to(wanted))
    with pytest.raises(UserError, match="x holds"):
        cast_into(out, values, "x")


@pytest.mark.parametrize(("stored", "wanted"), [(w, s) for s, w in NARROWING] + [(torch.float8_e4m3fn, torch.float16)])
def test_widening_is_never_checked(stored, wanted, monkeypatch):
    monkeypatch.setattr("nautile.checkpoint.casts.check_range", lambda *_: pytest.fail("checked"))
    cast_into(torch.empty(2, dtype=wanted), torch.ones(2, dtype=stored), "x")
    cast_into(torch.empty(2, dtype=stored), torch.ones(2, dtype=stored), "x")


def test_loading_names_the_tensor(tmp_path):
    model = build_model(V3_NANO)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.model.norm.weight[3] = 7e4
    nautile.save(model, tmp_path)
    with pytest.raises(UserError, match=r"(?s)model\.norm\.weight holds 70000.*float16 ends at 65504.*bf16"):
        nautile.load(tmp_path, torch.float16)
    assert nautile.load(tmp_path, torch.bfloat16).model.norm.weight[3] == torch.tensor(7e4).bfloat16()


@pytest.mark.parametrize(
    ("dtype", "stored", "value"),
    [("fp16", torch.bfloat16, 7e4), ("bf16", torch.float32, 3.4e38), ("fp32", torch.float64, 1e39)],
)
@pytest.mark.parametrize("pickled", [False, True])
def test_converting_names_the_tensor(tmp_path, dtype, stored, value, pickled):
    # Of a folder that is mostly narrower, float32 is kept wide: so most of this one is of the dtype in question.
    weights = {"a.weight": torch.ones(4, 3, dtype=stored), "b.weight": torch.ones(3, dtype=stored)}
    weights["b.weight"][1] = -value
    source = tmp_path / "src"
    source.mkdir()
    if pickled:
        torch.save(weights, source / "pytorch_model.bin")
    else:
        save_file(weights, source / "model.safetensors")
    with pytest.raises(UserError, match=r"b\.weight holds"):
        convert(source, tmp_path / "dst", Options(dtype, allow_pickle=True))
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(("wanted", "scale"), [("fp16", 200.0), ("bf16", 1e36), ("fp32", 1e36)])
def test_fp8_weights_times_their_scales(tmp_path, wanted, scale):
    weight = torch.ones(130, 140)
    weight[129, 139] = 448
    scales = torch.ones(2, 2)
    scales[1, 1] = scale
    weights = {"a.weight": weight.to(torch.float8_e4m3fn), "a.weight" + SCALE: scales}
    source = cases.write(tmp_path / "src", weights, cases.fp8_config({}))
    with pytest.raises(UserError, match=r"a\.weight holds (89600|4\.48e\+38)"):
        convert(source, tmp_path / "dst", Options(wanted))
    scales[1, 1] = 2.0
    save_file(weights, source / "model.safetensors")
    with open_checkpoint(source) as checkpoint:
        assert checkpoint.weight("a.weight", torch.empty(130, 140).half())[129, 139] == 896


def test_scales_so_large_that_a_factor_of_256_would_overflow():
    """Dequantising moves 2⁸ from the weights to the scales, unless those would become infinite."""
    from nautile.checkpoint.fp8 import dequantize

    weight = torch.tensor([[0.0, 0.5], [-1.0, 2.0]]).to(torch.float8_e4m3fn)
    assert torch.equal(dequantize(weight, torch.tensor([[2.0**121]])), weight.float() * 2.0**121)
