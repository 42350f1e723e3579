"""One thread per test process: the suite runs several processes on few cores, and sums keep their order.

Where there is no GPU, Triton interprets its kernels; which it must be told before it is imported.
"""

import os
from pathlib import Path

# Read when torch is first imported, which is after this file, and inherited by child processes.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"
