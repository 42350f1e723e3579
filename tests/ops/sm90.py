"""Compiles Triton kernels for sm_90 on a machine without a GPU, and tells what came out.

The test processes interpret Triton, which then has no compiled functions: one child process per list of kernels
compiles without the interpreter. Spills and registers are what ptxas says.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SHARED_LIMIT = 232448
"""Bytes of shared memory that one block may have on sm_90."""


@dataclass(frozen=True)
class Kernel:
    module: str
    """Where the kernel is, e.g. ``nautile.ops.triton.fp8_products``."""
    name: str
    signature: dict[str, str]
    """Argument → type, e.g. ``{"x": "*bf16", "n": "i32", "scale": "fp32"}``. Constants may be left out."""
    constants: dict[str, Any] = field(default_factory=dict)
    """Argument → value known at compile time: tile sizes, and None for pointers that are not given."""
    num_warps: int = 4
    num_stages: int = 3
    aligned: bool = True
    """Whether pointers and integers are multiples of 16, as they are for usual shapes."""


@dataclass(frozen=True)
class Report:
    name: str
    ptx: str
    shared: int
    """Bytes."""
    spills: int
    """Bytes of registers that a thread stores to memory, both ways."""
    registers: int

    def check(self, wgmma: bool = False) -> None:
        assert self.shared <= SHARED_LIMIT, f"{self.name}: {self.shared} bytes of shared memory"
        assert self.spills == 0, f"{self.name}: {self.spills} bytes spilled"
        assert not wgmma or "wgmma.mma_async" in self.ptx, f"{self.name}: no wgmma"


def compile_for_sm90(kernels: list[Kernel]) -> list[Report]:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, __file__, folder],
            input=json.dumps([asdict(kernel) for kernel in kernels]),
            env={**os.environ, "TRITON_INTERPRET": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-6000:]
        return [Report(**json.loads(line)) for line in done.stdout.splitlines()]


def _compile(kernel: Kernel, folder: Path) -> Report:
    from importlib import import_module

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(import_module(kernel.module), kernel.name)
    names = function.arg_names
    unknown = {*kernel.signature, *kernel.constants} - set(names)
    assert not unknown, f"{kernel.name} has no arguments {unknown}"
    signature = {name: kernel.signature.get(name, "constexpr") for name in names if name not in kernel.constants}
    signature |= dict.fromkeys(kernel.constants, "constexpr")
    signature = {name: signature[name] for name in names}
    multiples = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if kernel.aligned and (signature[name].startswith("*") or signature[name] in ("i32", "i64"))
    }
    source = ASTSource(function, signature, {(names.index(k),): v for k, v in kernel.constants.items()}, multiples)
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = made.asm["ptx"]
    told = _ptxas(ptx, folder)
    numbers = {what: int(n) for n, what in re.findall(r"(\d+) bytes (spill stores|spill loads)", told)}
    registers = int(re.search(r"Used (\d+) registers", told)[1])  # type: ignore[index]
    return Report(kernel.name, ptx, made.metadata.shared, sum(numbers.values()), registers)


def _ptxas(ptx: str, folder: Path) -> str:
    import triton

    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    arch = re.search(r"\.target (\S+)", ptx)[1].split(",")[0]  # type: ignore[index]
    done = subprocess.run(
        [str(assembler), "-v", f"-arch={arch}", str(source), "-o", str(folder / "kernel.cubin")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


if __name__ == "__main__":
    for entry in json.load(sys.stdin):
        print(json.dumps(asdict(_compile(Kernel(**entry), Path(sys.argv[1])))))
