"""One YAML a run; `schema.py` says what may stand in it."""

import os
import sys

if sys.version_info < (3, 11):  # every command imports this before what may not be installed
    sys.exit(f"error: this needs Python 3.11 or later, not {sys.version.split()[0]}")

# Read when torch is imported. Where a rank or torchrun has ended, torch's C++ side otherwise prints
# its stack on every other rank, around the one sentence that says who it was.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
