"""What holds for every test."""

import os

# Measured choices of algorithms stay in the process: no test reads or writes the user's cache.
os.environ.setdefault("DIFFHOOK_TUNING", "")
# Workers of pytest-xdist, and what they start, have a core each: threads of one would wait for another's.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
