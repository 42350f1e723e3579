import json

import pytest

from nautile.cli import doctor
from nautile.cli.main import main

GOOD = {
    "memory_bytes": 16e9,
    "free_disk_bytes": 50e9,
    "threads": 2,
    "cores": 2,
    "gemm_gflops": {"float32": 200.0, "bfloat16": 400.0},
}


def verdicts(**changes) -> list[str]:
    return [f"{verdict.good} {verdict.text}" for verdict in doctor.judge({**GOOD, **changes})]


def test_a_good_machine_has_no_problem():
    assert all(line.startswith("True") for line in verdicts())
    assert verdicts()[0] == "True memory: 16.0 GB, enough for nautile demo"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"memory_bytes": 1e9}, "False memory: 1.0 GB, less than the 3 GB of nautile demo"),
        ({"free_disk_bytes": 1e9}, "False free disk: 1.0 GB, less than the 2 GB of nautile demo"),
        ({"threads": 8}, "True threads: torch uses 8 on 2 cores, which is slow: set OMP_NUM_THREADS=2"),
        (
            {"gemm_gflops": {"float32": 200.0, "bfloat16": 100.0}},
            "True precision: bfloat16 products run at 0.5 times float32's speed, so train in float32",
        ),
    ],
)
def test_verdicts(changes, line):
    assert line in verdicts(**changes)


def test_json_and_lines_come_from_the_same_findings(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_DISK", 0)  # whatever this machine has
    monkeypatch.setattr(doctor, "LEAST_MEMORY", 0)
    assert main(["doctor", "--json", "--seconds", "0.02"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings["gemm_gflops"]["float32"] > 0
    assert findings["read_gbytes_per_second"] > 0
    assert len(findings["verdicts"]) == 4

    monkeypatch.setattr(doctor, "examine", lambda seconds, runs: findings)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert findings["cpu"] in out
    assert f"torch {findings['versions']['torch']}" in out
    assert out.count("\nok ") == 4


def test_a_machine_that_will_not_do_exits_with_one(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_DISK", 1e30)
    assert main(["doctor", "--seconds", "0.02"]) == 1
    assert "problem free disk" in capsys.readouterr().out
