"""What holds for every test."""

import os

# Measured choices of algorithms stay in the process: no test reads or writes the user's cache.
os.environ.setdefault("DIFFHOOK_TUNING", "")
