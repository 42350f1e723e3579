"""One thread per test process: the suite runs several processes on few cores, and sums keep their order.

Triton interprets its kernels, on machines with a GPU, too, unless the tests for GPUs are all that is run: which of the
two, a process must know before it imports Triton.
"""

import os
import sys

# Read when torch is first imported, which is after this file, and inherited by child processes.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

_named = [word for word in sys.argv[1:] if word.startswith("tests") or "/tests/" in word]
if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker inherits what was decided
    gpu_alone = bool(_named) and all("tests/gpu" in word for word in _named)
    os.environ["TRITON_INTERPRET"] = "0" if gpu_alone else "1"
