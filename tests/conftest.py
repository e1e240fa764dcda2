"""What all tests share: one thread a process, and small fixtures."""

import os

# Before any test imports torch: the test processes share the cores, and a trial sets its own number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
