"""Kernels work whatever ``torch.set_default_dtype`` says: native code must find the type that it writes."""

import ast
from pathlib import Path

import pytest

import nautile.ops

ROOT = Path(nautile.ops.__file__).parent
MAKERS = {"empty", "zeros", "ones", "full", "rand", "randn", "tensor", "scalar_tensor", "linspace"}


def calls_without_dtype(source: str) -> list[int]:
    """Lines that make a tensor of torch's default type."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MAKERS:
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if of_torch and "dtype" not in {keyword.arg for keyword in node.keywords}:
                found.append(node.lineno)
    return found


def test_the_check_sees_them() -> None:
    assert calls_without_dtype("torch.empty(3)\nx.new_empty(3)\ntorch.zeros(\n    3, dtype=d)\ntorch.full(s, 1.0)") == [
        1,
        5,
    ]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_new_tensor_names_its_type(path: Path) -> None:
    assert calls_without_dtype(path.read_text()) == []
