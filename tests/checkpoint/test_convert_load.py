"""What was converted loads: an FP8 export holds the quantised numbers, no others."""

import convert_cases as cases
import pytest
import torch

import nautile
from nautile.checkpoint.convert.options import Options
from nautile.checkpoint.convert.run import convert


@pytest.mark.parametrize("config", [cases.CONFIG, cases.V32], ids=["v3", "v32"])
def test_an_fp8_export_loads_as_its_dequantised_twin(tmp_path, config):
    ue8m0 = config is cases.V32
    weights = cases.tensors(config)
    convert(
        cases.write(tmp_path / "src", weights, config, 2), tmp_path / "fp8", Options("fp8", "ue8m0" if ue8m0 else None)
    )
    convert(tmp_path / "fp8", tmp_path / "fp32", Options("fp32"))
    convert(tmp_path / "fp8", tmp_path / "bf16", Options("bf16"))
    for dtype, twin in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        loaded = nautile.load(tmp_path / "fp8", dtype).state_dict()
        expected = nautile.load(tmp_path / twin, dtype).state_dict()
        assert cases.same(loaded, expected)
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"  # 160 rows: a block and a quarter
    assert not loaded[name].equal(weights[name])
    torch.testing.assert_close(loaded[name], weights[name], rtol=0.1, atol=0.02)
