"""The tables of `nautile ops` and `nautile bench kernels`."""

import json
import math

import pytest
import torch

from nautile import ops
from nautile.cli import bench
from nautile.cli import ops as ops_verb
from nautile.cli.kernel_bench import cases as bench_cases
from nautile.cli.kernel_bench.cases import Case, Ready, cases, copies, in_turns
from nautile.cli.kernel_bench.roofline import Roofline
from nautile.cli.kernel_bench.timing import Timer
from nautile.core import jit
from nautile.core.errors import UserError
from nautile.ops.dispatch import TABLE

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_ops_lists_every_op_with_its_backend_and_the_reasons(capsys):
    assert ops_verb.main(["--device", "cpu", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["op"] for row in rows] == list(TABLE)
    for row in rows:
        backends = TABLE[row["op"]][1]
        faster = backends[: backends.index(row["backend"])]
        assert list(row["passed_over"]) == list(faster), "a reason for each backend before the one that runs"
        assert all(row["passed_over"].values())


def test_ops_prints_a_table(capsys, monkeypatch):
    monkeypatch.setenv("NAUTILE_OPS", "reference")
    assert ops_verb.main(["--device", "cpu", "--dtype", "bf16"]) == 0
    out = capsys.readouterr().out
    assert "ops on cpu, bf16" in out
    assert "cpu: reference is forced" in out


def test_ops_says_why_c_does_not_run(capsys, monkeypatch):
    monkeypatch.setattr(jit, "why_no_cxx", lambda: "no C++ compiler found")
    assert ops_verb.main(["--device", "cpu"]) == 0
    assert "without the C++ of decoding: no C++ compiler found" in capsys.readouterr().out


def test_ops_shows_what_a_forced_backend_cannot_run(capsys, monkeypatch):
    monkeypatch.setenv("NAUTILE_OPS", "hopper")
    assert ops_verb.main(["--device", "cpu", "--json"]) == 0
    rows = {row["op"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["fp8_gemm"]["backend"] == "nothing"
    assert rows["fp8_gemm"]["passed_over"]["hopper"] == "tensors are on cpu"
    assert rows["rms_norm"]["backend"] == "cpu"
    assert "nothing" in ops.dispatch.summary(CPU)


def test_ops_refuses_unknown_places_and_types():
    for flags in (["--device", "tpu"], ["--dtype", "int7"]):
        with pytest.raises(UserError):
            ops_verb.main(flags)


def test_the_summary_of_a_run_counts_every_op():
    line = ops.dispatch.summary(CPU)
    counted = [int(word) for word in line.replace(",", " ").split() if word.isdigit()]
    assert sum(counted) == len(TABLE)


@pytest.fixture
def tiny(monkeypatch):
    def norm(device: torch.device) -> Ready:
        x, w = torch.randn(4, 8), torch.randn(8)
        return Ready(
            lambda: ops.rms_norm(x, w, 1e-6),
            x,
            128,
            288,
            "float32",
            lambda: torch.nn.functional.rms_norm(x, (8,)),
            "torch",
        )

    def alone(device: torch.device) -> Ready:
        x = torch.randn(4, 8)
        return Ready(lambda: ops.swiglu(x, x), x, 128, 288, "bfloat16")

    monkeypatch.setattr(
        "nautile.cli.kernel_bench.run.cases",
        lambda device, quick: [Case("rms_norm", "4 x 8", norm), Case("swiglu", "4 x 8", alone)],
    )


def test_bench_measures_prints_and_writes(tiny, tmp_path, capsys):
    out = tmp_path / "new" / "kernels.json"
    assert bench.main(["kernels", "--device", "cpu", "--seconds", "0.01", "--threads", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    norm, alone = found["rows"]
    assert (norm["op"], norm["backend"], norm["baseline"]) == ("rms_norm", "cpu", "torch")
    assert norm["times_as_fast"] == pytest.approx(norm["baseline_microseconds"] / norm["microseconds"])
    assert alone["baseline"] is None and alone["times_as_fast"] is None
    limits = Roofline(**found["roofline"])
    assert norm["of_roofline"] == pytest.approx(limits.seconds(128, 288, "float32") / norm["microseconds"] * 1e6)
    assert "rms_norm" in printed and "roofline, measured in this run" in printed


def test_bench_json_is_json_alone(tiny, capsys):
    bench.main(["kernels", "--device", "cpu", "--seconds", "0.01", "--threads", "1", "--json", "--only", "swiglu"])
    assert [row["op"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["swiglu"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["kernels", "--only", "nothing"], "rms_norm, swiglu"),
        (["kernels", "--seconds", "0"], "--seconds 0"),
        (["kernels", "--threads", "0"], "--threads 0"),
        (["models"], "kernels"),
    ],
)
def test_bench_refuses_with_a_cure(tiny, flags, says):
    with pytest.raises(UserError) as error:
        bench.main([*flags, "--device", "cpu"])
    assert says in str(error.value)


def test_the_shortest_time_is_that_of_the_tighter_limit():
    limits = Roofline(bytes_per_second=10.0, flops_per_second={"float32": 100.0, "bfloat16": 400.0})
    assert limits.seconds(flops=200, moved=10, dtype="bfloat16") == 1.0
    assert limits.seconds(flops=200, moved=10, dtype="float32") == 2.0
    assert limits.seconds(flops=200, moved=10, dtype="float8_e4m3fn") == 2.0, "not listed: multiplied in float32"


def test_works_are_timed_in_turns():
    calls: list[str] = []
    medians = Timer(CPU, 0.001).medians(lambda: calls.append("ours"), lambda: calls.append("theirs"))
    assert len(medians) == 2 and all(math.isfinite(taken) for taken in medians)
    assert calls == ["ours", "theirs"] * (len(calls) // 2)


def test_operands_taken_in_turns_outgrow_a_cache():
    assert copies(CPU, 1 << 20) * (1 << 20) >= bench_cases.COLD_BYTES
    assert copies(torch.device("cuda"), 1) == 1
    turn = in_turns([lambda: 1, lambda: 2])
    assert [turn() for _ in range(4)] == [1, 2, 1, 2]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_name_ops_that_exist_and_quick_ones_are_fewer(device):
    every, quick = (cases(torch.device(device), which) for which in (False, True))
    assert {case.op for case in every} <= set(TABLE)
    assert {(case.op, case.shape) for case in quick} <= {(case.op, case.shape) for case in every}
    assert len({(case.op, case.shape) for case in every}) == len(every) > len(quick)
