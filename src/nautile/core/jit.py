"""Native code, compiled where it runs and when it is first used: C++ into a shared library, CUDA into a cubin.

What was compiled is kept under a hash of everything that went into it: the text of the sources, the flags, the
compiler's version and, because of ``-march=native``, the processor's features. A library made on one machine is thus
never loaded on another that shares its home folder. A compiler that is missing or of no use is a reason, not an error:
the ``why_no_…`` functions tell it, and the caller runs something else.

The folder is ``$NAUTILE_CACHE/jit``, or ``nautile/jit`` in the user's cache folder. It may be deleted at any time. One
that everybody may write to, or that belongs to another user than root, is not used.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

from nautile.core import log, machine
from nautile.core.errors import NautileError

CXX_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
"""No ``-ffast-math``: infinities and NaN keep their meaning."""
NVCC_FLAGS = ("-O3", "-std=c++17", "-cubin")
_PROBE = Path(__file__).with_name("probe.cpp")


class CompileError(NautileError):
    """A compiler refused our source. Exit code 1."""


def cache_folder() -> Path:
    """Where compiled code is kept."""
    chosen = os.environ.get("NAUTILE_CACHE")
    if chosen:
        return Path(chosen).expanduser() / "jit"
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(home) if home else Path.home() / ".cache") / "nautile" / "jit"
    except RuntimeError as error:  # a user without an entry, as in some containers
        raise FileNotFoundError(f"{error} set NAUTILE_CACHE to a folder of yours") from error


@cache
def why_no_cxx() -> str | None:
    """Why C++ cannot be compiled and run here; None if it can. Asked first, it compiles a few lines."""
    if os.name != "posix":
        return f"compiling C++ at first use is not built for {platform.system()}"
    compiler = _cxx()
    if compiler is None:
        return "no C++ compiler found: install g++, or set CXX"
    # Compilers without OpenMP or with another one than torch's, folders that cannot be written or run from.
    try:
        _load(_PROBE, (), ())
    except CompileError as error:
        return f"{compiler} does not compile a test: {error.why.splitlines()[0] if error.why else error.what}"
    except OSError as error:
        return f"what {compiler} compiles cannot be kept (NAUTILE_CACHE names a folder for it) and loaded: {error}"
    return None


@cache
def why_no_nvcc() -> str | None:
    """Why CUDA cannot be compiled here; None if it can."""
    return None if _nvcc() else "nvcc not found: install the CUDA toolkit, or set CUDA_HOME"


def load_cxx(source: Path, *headers: Path, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The shared library made from one C++ file, compiled unless that was done before.

    It uses the OpenMP threads of torch: a second pool beside torch's would compete with it for the same cores.

    Args:
        source: The C++ file; what Python calls is ``extern "C"``.
        headers: Files that it includes from beside it.
        flags: Further compiler flags, after `CXX_FLAGS`.

    Raises:
        CompileError: There is no compiler, or it refuses the source.
    """
    return _load(source.resolve(), tuple(header.resolve() for header in headers), tuple(flags))


def compile_cuda(
    source: Path, *headers: Path, defines: Mapping[str, str | int] | None = None, arch: str = "sm_90a"
) -> Path:
    """The cubin made from one CUDA file, compiled unless that was done before.

    Args:
        source: The ``.cu`` file.
        headers: Files that it includes from beside it.
        defines: Macro → value: what is known at compile time, such as tile sizes.
        arch: The one architecture to compile for.

    Raises:
        CompileError: There is no nvcc, or it refuses the source.
    """
    nvcc = _nvcc()
    if nvcc is None:
        raise CompileError(f"{source.name} cannot be compiled", why_no_nvcc() or "", "install it, then call again")
    target = f"-gencode=arch=compute_{arch.removeprefix('sm_')},code={arch}"
    named = [f"-D{name}={value}" for name, value in sorted((defines or {}).items())]
    command = [nvcc, *NVCC_FLAGS, target, *named]
    key = _key([source, *headers], command, _version(nvcc))
    return _built(source, key, ".cubin", lambda out: [*command, str(source), "-o", str(out)])


@cache
def _load(source: Path, headers: tuple[Path, ...], flags: tuple[str, ...]) -> ctypes.CDLL:
    compiler = _cxx()
    if compiler is None:
        raise CompileError(f"{source.name} cannot be compiled", why_no_cxx() or "", "install one, then call again")
    openmp = _openmp_of_torch()
    command = [compiler, *CXX_FLAGS, *flags]
    key = _key([source, *headers], [*command, openmp], _version(compiler) + machine.cpu_features())

    def link(out: Path) -> list[str]:
        # Against torch's OpenMP by path; -fopenmp would make the linker look for the compiler's own.
        return [compiler, "-shared", str(out.with_suffix(".o")), openmp, "-o", str(out)]

    library = _built(
        source, key, ".so", lambda out: [*command, "-c", str(source), "-o", str(out.with_suffix(".o"))], link
    )
    return ctypes.CDLL(str(library))


def _built(
    source: Path,
    key: str,
    suffix: str,
    *steps: Callable[[Path], list[str]],
) -> Path:
    """The file in the cache, made by `steps` in a folder of its own and moved there in one go."""
    target = cache_folder() / f"{source.stem}-{key}{suffix}"
    target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    _refuse_others(target.parent)
    if target.exists():
        return target
    log.log(f"compiling {source.name} once for this machine, into {target.parent}")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as folder:
        made = Path(folder) / target.name
        for step in steps:
            command = step(made)
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise CompileError(
                    f"{source.name} does not compile",
                    (done.stderr or done.stdout).strip()[-4000:],
                    "NAUTILE_OPS=reference runs without compiled code; the message above says what the compiler minds",
                )
        made.chmod(0o755)  # whatever the umask is
        made.replace(target)
    return target


def _refuse_others(folder: Path) -> None:
    """Raise `PermissionError` if others may put files into `folder`: names are predictable, and what is there runs."""
    if os.name != "posix":
        return
    status, me = folder.stat(), os.getuid()
    if status.st_mode & stat.S_IWOTH:
        raise PermissionError(
            f"everybody may write to {folder}, so others could have their code run: chmod o-w {folder}"
        )
    if me and status.st_uid not in (0, me):
        raise PermissionError(
            f"{folder} belongs to another user, whose code would run: NAUTILE_CACHE names another one"
        )


def _key(files: Sequence[Path], command: Sequence[str], machine_: str) -> str:
    digest = hashlib.sha256()
    for part in (*(file.read_bytes() for file in files), *(word.encode() for word in command), machine_.encode()):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:20]


@cache
def _cxx() -> str | None:
    names = (os.environ.get("CXX"), "g++", "c++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


@cache
def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = ([str(Path(home) / "bin" / "nvcc")] if home else []) + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for place in places if (found := shutil.which(place))), None)


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _openmp_of_torch() -> str:
    """Path of the OpenMP library that torch brought and has loaded; the compiler's own where torch brought none."""
    import torch

    home = Path(torch.__file__).parent
    for folder in (home / "lib", home.parent / "torch.libs"):
        found = sorted(folder.glob("libgomp*.so*"))
        if found:
            return str(found[0])
    return "-lgomp"
