import json
from pathlib import Path

import pytest
import torch

from nautile.core import machine


def test_tests_run_on_one_thread():
    assert torch.get_num_threads() == 1


def test_describe_is_plain_json():
    described = json.loads(json.dumps(machine.describe()))
    assert described["cpu"]
    assert 1 <= described["cores"] <= 4096
    assert described["memory_bytes"] > 1e8
    assert described["versions"]["torch"] == torch.__version__
    assert described["threads"] == 1


def test_a_container_quota_limits_cores_and_memory(monkeypatch):
    files = {"/sys/fs/cgroup/cpu.max": "50000 100000", "/sys/fs/cgroup/memory.max": "1000"}
    monkeypatch.setattr(machine, "_read", lambda path: files.get(str(path), ""))
    assert machine.cores() == 1
    assert machine.memory_bytes() == 1000
    files |= {"/sys/fs/cgroup/cpu.max": "max 100000", "/sys/fs/cgroup/memory.max": "max"}
    assert machine.memory_bytes() > 1e8


@pytest.mark.parametrize("dtype", ["float32", torch.bfloat16])
def test_gemm_peak_is_not_below_a_product_timed_here(dtype):
    peak = machine.measure_gemm_peak(dtype, seconds=0.03)
    assert 0.01 < peak < 1e6


def test_gemm_counts_two_flops_per_multiply_add(monkeypatch):
    monkeypatch.setattr(machine, "_shortest", lambda work, seconds: 2.0)
    assert machine.measure_gemm_peak("float32") == pytest.approx(2048**3 / 1e9)


def test_read_bandwidth_counts_bytes(monkeypatch):
    monkeypatch.setattr(machine, "_shortest", lambda work, seconds: work().item() * 0 + 0.5)
    assert machine.measure_read_bandwidth() == pytest.approx(2 * machine._READ_BYTES / 1e9)


def test_free_disk_of_a_folder_that_is_not_there_yet(tmp_path):
    assert machine.free_disk_bytes(tmp_path / "a" / "b") == pytest.approx(machine.free_disk_bytes(tmp_path), rel=0.1)
    assert machine.free_disk_bytes(Path("nowhere")) > 0
