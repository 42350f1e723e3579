"""The part of load_convert.py that converts a checkpoint, beside plain reading and writing on the same disk.

Per round and direction, each in a process of its own, with the files dropped from the page cache before:

    read        the source, sequentially, through one buffer
    write       as many bytes as the result has, sequentially, and fsync
    read back   those bytes again, dropped from the page cache
    convert     nautile convert: reads, casts, writes, flushes, reads back and compares

What one disk needs at least is read + write + read back; `of the disk's speed` is that time over the conversion's,
paired by round. It can pass 1 where reading and writing overlap.
"""

import json
import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DIRECTIONS = (("fp8", "bf16"), ("bf16", "fp8"))
BUFFER = 8 << 20

Worker = Callable[[str, Path], dict[str, Any]]


def convert_section(folder: Path, rounds: int, worker: Worker) -> dict[str, Any]:
    """Both directions of the checkpoints in ``folder/fp8`` and ``folder/bf16``.

    Args:
        folder: Where they are; the results are written beside them and removed.
        rounds: How often everything is measured.
        worker: Does a named piece of work on a path in a new process.
    """
    rows = {}
    for source, dtype in DIRECTIONS:
        found: dict[str, list[dict[str, Any]]] = {"read": [], "write": [], "read back": [], "convert": []}
        for _ in range(rounds):
            drop(folder / source)
            found["read"].append(worker("read", folder / source))
            drop(folder / source)
            found["convert"].append(worker(f"convert {dtype}", folder / source))
            size = found["convert"][-1]["bytes_out"]
            found["write"].append(worker(f"convert-write {size}", folder / "written"))
            drop(folder / "written")
            found["read back"].append(worker("read", folder / "written"))
            shutil.rmtree(folder / "written")
        rows[f"{source} to {dtype}"] = row = summary(found)
        print(f"convert {source} to {dtype}: {json.dumps(row)}", file=sys.stderr)
    return rows


def drop(folder: Path) -> None:
    """Drop the folder's files from the page cache; the disk of a virtual machine may still be cached by its host."""
    for path in folder.glob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def summary(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds, and ratios paired by round."""
    convert = found["convert"]

    def rate(name: str, key: str = "bytes") -> float:
        return round(statistics.median(row[key] / row["seconds"] for row in found[name]) / 1e6, 1)

    def ratio(*parts: str) -> float:
        pairs = zip(convert, *(found[part] for part in parts), strict=True)
        return round(statistics.median(sum(row["seconds"] for row in rest) / row["seconds"] for row, *rest in pairs), 3)

    return {
        "gigabytes_in": round(convert[0]["bytes_in"] / 1e9, 3),
        "gigabytes_out": round(convert[0]["bytes_out"] / 1e9, 3),
        "seconds": [round(row["seconds"], 2) for row in convert],
        "cpu_seconds": [round(row["cpu_seconds"], 2) for row in convert],
        "megabytes_in_per_second": rate("convert", "bytes_in"),
        "megabytes_out_per_second": rate("convert", "bytes_out"),
        "disk_read_megabytes_per_second": rate("read"),
        "disk_write_megabytes_per_second": rate("write"),
        "disk_read_back_megabytes_per_second": rate("read back"),
        "of the disk's speed, read + write + read back": ratio("read", "write", "read back"),
        "of the disk's speed, read + write": ratio("read", "write"),
        "peak_rss_mib": round(max(row["peak_rss_mib"] for row in convert)),
        "rss_mib_before": round(max(row["rss_mib_before"] for row in convert)),
        "largest_file_mib": round(convert[0]["largest_file_mib"]),
        "largest_tensor_mib": round(convert[0]["largest_tensor_mib"]),
    }


def work(name: str, model: Path) -> dict[str, Any]:
    """The working side of `convert DTYPE` and `convert-write BYTES`."""
    verb, _, argument = name.partition(" ")
    return write(model, int(argument)) if verb == "convert-write" else convert(model, argument)


def convert(source: Path, dtype: str) -> dict[str, Any]:
    """Seconds and memory of one conversion, whose result is removed."""
    from nautile.checkpoint.convert import run
    from nautile.checkpoint.convert.options import Options
    from nautile.checkpoint.source import open_checkpoint

    with open_checkpoint(source) as checkpoint:
        largest = max(info.nbytes for info in checkpoint.infos.values())
    destination = source.with_name("converted")
    before = peak_mib()
    start, cpu = time.perf_counter(), time.process_time()
    summary = run.convert(source, destination, Options(dtype))  # type: ignore[arg-type]
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = peak_mib()
    shutil.rmtree(destination)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "bytes_in": summary.bytes_in,
        "bytes_out": summary.bytes_out,
        "peak_rss_mib": peak,
        "rss_mib_before": before,
        "largest_file_mib": max(path.stat().st_size for path in source.glob("*.safetensors")) / 2**20,
        "largest_tensor_mib": largest / 2**20,
    }


def write(folder: Path, size: int) -> dict[str, Any]:
    """Seconds to write a file of `size` bytes and flush it."""
    folder.mkdir()
    buffer = os.urandom(BUFFER)
    start = time.perf_counter()
    handle = os.open(folder / "x.safetensors", os.O_WRONLY | os.O_CREAT)
    done = 0
    while done < size:
        done += os.write(handle, memoryview(buffer)[: size - done])
    os.fsync(handle)
    os.close(handle)
    return {"seconds": time.perf_counter() - start, "bytes": size}


def peak_mib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
