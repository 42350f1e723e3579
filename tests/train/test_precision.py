import pytest
import torch

from nautile.core.errors import UserError
from nautile.train.precision import autocast, resolve_device, resolve_precision

CPU = torch.device("cpu")


def test_what_is_asked_for_is_taken():
    assert resolve_precision("fp32", CPU) == ("fp32", "as asked")
    assert resolve_device("cpu") == (CPU, "as asked")


def test_automatic_choices_follow_the_machine_and_say_why(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert resolve_precision("auto", CPU)[0] == "bf16"
    assert "avx512_bf16" in resolve_precision("auto", CPU)[1]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    precision, why = resolve_precision("auto", CPU)
    assert precision == "fp32" and "emulated" in why
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == (CPU, "no CUDA here")


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        resolve_device("cuda")


def test_bf16_rounds_products_and_fp32_does_not():
    x = torch.full((2, 2), 1.0 + 2**-12)
    with autocast("bf16", CPU):
        assert (x @ x).dtype == torch.bfloat16
    with autocast("fp32", CPU):
        assert (x @ x).dtype == torch.float32
