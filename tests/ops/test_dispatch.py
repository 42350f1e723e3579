"""The table of backends: what it chooses, what forces it, what it says."""

import pytest
import torch

from nautile import ops
from nautile.core import jit
from nautile.core.errors import UserError
from nautile.ops.dispatch import BACKENDS, TABLE, backend_for, implementation
from nautile.ops.triton import unavailable


def backend_of(op: str) -> str:
    return implementation(op, torch.zeros(1)).__module__.split(".")[-2]


def test_the_first_backend_without_a_reason_wins() -> None:
    """On a CPU with a compiler: what is written for CPUs where it exists, the reference elsewhere."""
    if jit.why_no_cxx():
        pytest.skip(str(jit.why_no_cxx()))
    for choice in ops.choices():
        _, backends = TABLE[choice.op]
        assert choice.backend == ("cpu" if "cpu" in backends else "reference"), choice.op
        assert list(choice.passed_over) == list(backends[: backends.index(choice.backend)])


def test_every_op_has_a_reference_and_its_backends_stand_in_one_order() -> None:
    for op, (_, backends) in TABLE.items():
        assert backends[-1] == "reference", op
        assert list(backends) == [backend for backend in BACKENDS if backend in backends], op


def test_a_device_without_a_fast_backend_gets_the_reference_and_the_reason() -> None:
    for choice in ops.choices("meta"):
        assert choice.backend == "reference"
        faster = TABLE[choice.op][1][:-1]
        assert choice.passed_over == dict.fromkeys(faster, "tensors are on meta")


def test_a_dtype_without_a_fast_backend_gets_the_reference() -> None:
    assert {choice.backend for choice in ops.choices(dtype=torch.float16)} == {"reference"}


def test_interpreting_triton_has_to_be_asked_for() -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled")
    x = torch.zeros(1)
    assert backend_for("index_scores", x) != "triton"
    with ops.use("triton"):
        assert backend_for("index_scores", x) == "triton"
        assert backend_for("rms_norm", x) in ("cpu", "reference"), "has no Triton form: runs as it would anyway"


def test_an_op_asks_its_package_before_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without Triton never imports a Triton kernel to learn that it cannot run."""
    monkeypatch.setattr("nautile.ops.triton.find_spec", lambda name: None)
    assert unavailable(torch.device("cuda")) == "triton is not installed: pip install triton"


def test_no_op_is_called_like_a_file() -> None:
    """Importing ``nautile.ops.<topic>`` puts the module into the package under that name, over an op of that name."""
    assert not set(TABLE) & {topic for topic, _ in TABLE.values()}


def test_use_forces_one_and_ends_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    with ops.use("reference"):
        assert backend_of("rms_norm") == "reference"
        with ops.use("cpu"):
            assert backend_of("rms_norm") == "cpu"
    assert backend_of("rms_norm") == "cpu"


def test_the_environment_forces_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAUTILE_OPS", "reference")
    assert backend_of("causal_attention") == "reference"
    assert set(ops.choices()[0].passed_over.values()) == {"reference is forced"}


def test_unknown_backend_names_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="cpu, reference"), ops.use("cuda"):
        pass
    monkeypatch.setenv("NAUTILE_OPS", "fast")
    with pytest.raises(UserError, match="'fast'"):
        ops.rms_norm(torch.ones(2), torch.ones(2), 1e-6)


def test_a_forced_backend_that_cannot_run_says_why() -> None:
    with ops.use("cpu"), pytest.raises(UserError, match="tensors are on meta"):
        ops.rms_norm(torch.ones(2, device="meta"), torch.ones(2, device="meta"), 1e-6)


WRONG = [
    (lambda: ops.rms_norm(torch.ones(2, 3), torch.ones(2), 1e-6), r"weight must be \[3\]"),
    (lambda: ops.swiglu(torch.ones(2, 3), torch.ones(3, 2)), "must agree"),
    (lambda: ops.swiglu(torch.ones(2), torch.ones(2).double()), "must agree"),
    (lambda: ops.rotate_interleaved(torch.ones(1, 2, 1, 3), torch.ones(1, 2, 1), torch.ones(1, 2, 1)), "R/2"),
    (lambda: ops.rotate_interleaved(torch.ones(2, 4), torch.ones(2, 2), torch.ones(2, 2)), "R/2"),
    (
        lambda: ops.causal_attention(torch.ones(1, 2, 1, 4), torch.ones(1, 3, 1, 4), torch.ones(1, 2, 1, 4), 1.0),
        "q and k",
    ),
    (lambda: ops.causal_attention(*[torch.ones(1, 2, 1, 4)] * 2, torch.ones(1, 3, 1, 4), 1.0), "v must"),
    (lambda: ops.causal_attention(*[torch.ones(1, 2, 1, 4)] * 3, 1.0, torch.zeros(2)), "document_ids"),
    (lambda: ops.causal_attention(*[torch.ones(1, 2, 1, 4).long()] * 3, 1.0), "floating"),
    (lambda: ops.linear(torch.ones(2, 3), torch.ones(5, 4)), r"weights \[O, D\]"),
    (lambda: ops.linear(torch.ones(2, 3), torch.ones(5, 3), torch.ones(3)), r"bias must be \[5\]"),
    (lambda: ops.gated_linear(torch.ones(2, 3), torch.ones(5, 3), torch.ones(4, 3)), "must agree"),
    (
        lambda: ops.causal_attention(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 2, 4), torch.ones(1, 2, 2, 4), 1.0),
        "multiple of G",
    ),
    (lambda: ops.rotate_half_split(torch.ones(1, 2, 1, 3), torch.ones(1, 2, 1), torch.ones(1, 2, 1)), "R/2"),
    (lambda: ops.linear_cross_entropy(torch.ones(2, 3), torch.ones(5, 4), torch.zeros(2).long()), "weight"),
    (lambda: ops.linear_cross_entropy(torch.ones(2, 3), torch.ones(5, 3), torch.zeros(2)), "int64"),
    (lambda: ops.linear_cross_entropy(torch.ones(2, 3), torch.ones(5, 3), torch.zeros(2).long(), chunk=0), "chunk"),
    (lambda: experts(x=torch.ones(2, 4)), "gate_up"),
    (lambda: experts(down=torch.ones(2, 3, 5)), "down must"),
    (lambda: experts(chosen=torch.zeros(2, 1)), "int64"),
    (lambda: experts(weights=torch.ones(2, 2)), "weights"),
    (lambda: experts(chosen=torch.full((2, 1), 7)), r"in \[0, 2\)"),
    (lambda: experts(chosen=torch.full((2, 1), -1)), r"in \[0, 2\)"),
]


def experts(x=None, down=None, chosen=None, weights=None) -> torch.Tensor:
    """A grouped_swiglu of E = 2, D = 3, F = 4, with one argument replaced."""
    return ops.grouped_swiglu(
        torch.ones(2, 3) if x is None else x,
        torch.ones(2, 8, 3),
        torch.ones(2, 3, 4) if down is None else down,
        torch.zeros(2, 1, dtype=torch.int64) if chosen is None else chosen,
        torch.ones(2, 1) if weights is None else weights,
    )


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_wrong_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
