"""Compiling at first use: kept, keyed by all that went in, atomic, and a reason where there is no compiler."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from nautile.core import jit

SUM = """
#include "scale.h"
#include <cstdint>
#include <omp.h>
extern "C" int64_t threads(int64_t n) {
  int64_t count = 0;
#pragma omp parallel num_threads(n) reduction(+ : count)
  count += 1;
  return count;
}
extern "C" double scaled_sum(const float* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += x[i];
  return sum * SCALE * FACTOR;
}
"""
needs_cxx = pytest.mark.skipif(jit.why_no_cxx() is not None, reason=str(jit.why_no_cxx()))
needs_nvcc = pytest.mark.skipif(jit.why_no_nvcc() is not None, reason=str(jit.why_no_nvcc()))


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("NAUTILE_CACHE", str(tmp_path / "cache"))
    forget()
    yield
    forget()


def forget() -> None:
    for cached in (jit.why_no_cxx, jit.why_no_nvcc, jit._cxx, jit._nvcc, jit._load, jit._version):
        cached.cache_clear()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "scale.h").write_text("#define SCALE 2\n")
    (tmp_path / "sum.cpp").write_text(SUM)
    return tmp_path / "sum.cpp"


def load(source: Path, factor: int = 1) -> ctypes.CDLL:
    library = jit.load_cxx(source, source.with_name("scale.h"), flags=(f"-DFACTOR={factor}",))
    library.scaled_sum.restype = ctypes.c_double
    return library


def total(library: ctypes.CDLL) -> float:
    return library.scaled_sum((ctypes.c_float * 3)(1, 2, 3), ctypes.c_int64(3))


@needs_cxx
def test_compiles_once_and_again_when_source_header_or_flag_changes(source: Path, tmp_path: Path) -> None:
    made = tmp_path / "cache" / "jit"
    assert total(load(source)) == 12
    forget()
    assert total(load(source)) == 12
    assert len(list(made.iterdir())) == 1
    assert total(load(source, factor=5)) == 60
    source.with_name("scale.h").write_text("#define SCALE 3\n")
    forget()
    assert total(load(source)) == 18
    assert len(list(made.iterdir())) == 3, "nothing half made is left"


@needs_cxx
def test_threads_are_those_of_torch(source: Path) -> None:
    library = load(source)
    assert library.threads(ctypes.c_int64(2)) == 2
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    assert len(loaded) == 1, "two OpenMP libraries would compete for the cores"


@needs_cxx
def test_processes_that_compile_at_once_end_with_one_library(source: Path, tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from nautile.core import jit\n"
        f"print(jit.load_cxx(Path({str(source)!r}), Path({str(source.with_name('scale.h'))!r}), flags=('-DFACTOR=1',))"
        ".threads(1))"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=os.environ.copy())
        for _ in range(3)
    ]
    assert [process.communicate()[0] for process in started] == [b"1\n"] * 3
    assert len(list((tmp_path / "cache" / "jit").iterdir())) == 1


@needs_cxx
def test_a_refused_source_says_what_the_compiler_minds(tmp_path: Path) -> None:
    (tmp_path / "bad.cpp").write_text("int f() { return unheard_of; }")
    with pytest.raises(jit.CompileError, match=r"bad\.cpp(.|\n)*unheard_of"):
        jit.load_cxx(tmp_path / "bad.cpp")
    assert not list((tmp_path / "cache" / "jit").iterdir())


def test_no_compiler_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jit.shutil, "which", lambda name: None)
    assert "install g++" in (jit.why_no_cxx() or "")
    assert "nvcc not found" in (jit.why_no_nvcc() or "")
    with pytest.raises(jit.CompileError, match="no C\\+\\+ compiler"):
        load(source)
    with pytest.raises(jit.CompileError, match="nvcc not found"):
        jit.compile_cuda(source)


@needs_cxx
def test_a_compiler_of_no_use_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "half-a-compiler"
    compiler.write_text("#!/bin/sh\necho 'unsupported option -fopenmp' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert "half-a-compiler does not compile a test: unsupported option -fopenmp" in (jit.why_no_cxx() or "")


@needs_cxx
def test_a_folder_that_cannot_be_written_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NAUTILE_CACHE", str(tmp_path / "file"))
    assert "NAUTILE_CACHE" in (jit.why_no_cxx() or "")


@needs_cxx
def test_a_folder_that_everybody_may_write_to_is_not_used(source: Path, tmp_path: Path) -> None:
    load(source)
    folder = tmp_path / "cache" / "jit"
    assert not folder.stat().st_mode & 0o022
    assert not any(made.stat().st_mode & 0o022 for made in folder.iterdir())
    folder.chmod(0o777)
    forget()
    with pytest.raises(PermissionError, match=f"chmod o-w {folder}"):
        load(source)
    assert "chmod o-w" in (jit.why_no_cxx() or "")


@pytest.mark.parametrize(("owner", "me", "refused"), [(7, 8, True), (8, 8, False), (0, 8, False), (7, 0, False)])
def test_a_folder_of_another_user_is_not_used(
    owner: int, me: int, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(jit.os, "getuid", lambda: me)
        patched.setattr(jit.Path, "stat", lambda folder: SimpleNamespace(st_mode=0o40755, st_uid=owner))
        with pytest.raises(PermissionError, match="another user") if refused else nullcontext():
            jit._refuse_others(tmp_path)


@needs_cxx
def test_a_user_without_a_home_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("NAUTILE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jit.Path, "home", homeless)
    assert "Could not determine home directory" in (jit.why_no_cxx() or "")


@needs_nvcc
def test_cuda_becomes_a_cubin_per_set_of_macros(tmp_path: Path) -> None:
    source = tmp_path / "fill.cu"
    source.write_text('extern "C" __global__ void fill(float* x) { x[threadIdx.x] = VALUE; }')
    first = jit.compile_cuda(source, defines={"VALUE": 1})
    second = jit.compile_cuda(source, defines={"VALUE": 2})
    assert first != second
    assert first.read_bytes()[:4] == b"\x7fELF"
    assert jit.compile_cuda(source, defines={"VALUE": 1}) == first
