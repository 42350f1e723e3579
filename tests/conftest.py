"""One thread per test process: the suite runs several processes on few cores, and sums keep their order."""

import os

# Read when torch is first imported, which is after this file, and inherited by child processes.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
