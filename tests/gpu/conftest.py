"""Kernels on a GPU: ``pytest tests/gpu``, by itself, since other tests have Triton interpret its kernels."""

import os

import pytest


@pytest.fixture(autouse=True)
def compiled() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets its kernels in this run: pytest tests/gpu runs them on the GPU")
