"""One YAML a run; `schema.py` says what may stand in it."""

import os
import sys

if sys.version_info < (3, 11):  # every command imports this before what may not be installed
    sys.exit(f"error: this needs Python 3.11 or later, not {sys.version.split()[0]}")

# Read when torch is imported. Where torchrun or a rank has ended, torch's C++ side otherwise prints
# its own stack on every other rank, and that sentence hides ours.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
