"""One torch thread per test process: the suite runs several processes on few cores, and sums keep their order."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, so that child processes inherit it
os.environ.setdefault("MKL_NUM_THREADS", "1")


def pytest_configure() -> None:
    import torch

    torch.set_num_threads(1)
