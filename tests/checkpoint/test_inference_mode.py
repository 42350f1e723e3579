"""Loading inside torch.inference_mode() gives the same model as outside, one that can be trained."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nautile
from nautile.models.deepseek_v3.config import V3_NANO
from nautile.models.deepseek_v3.model import DeepseekV3ForCausalLM


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_in_inference_mode(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nautile.checkpoint.load._JOB", 1 << 12)  # large tensors are filled through views
    model = DeepseekV3ForCausalLM(replace(V3_NANO, vocab_size=300, num_nextn_predict_layers=0))
    model.init_weights(torch.Generator().manual_seed(0))
    nautile.save(model, tmp_path)
    with torch.inference_mode():
        loaded = nautile.load(tmp_path, dtype=dtype)
        loaded(torch.tensor([[1, 2, 3]]))
    outside = nautile.load(tmp_path, dtype=dtype).state_dict()
    for name, tensor in loaded.state_dict().items():
        assert not tensor.is_inference() and torch.equal(tensor, outside[name]), name
    loaded(torch.tensor([[1, 2, 3]])).sum().backward()
    assert loaded.lm_head.weight.grad is not None
