"""One YAML a run; `schema.py` says what may stand in it."""

import sys

if sys.version_info < (3, 11):  # every command imports this before what may not be installed
    sys.exit(f"error: this needs Python 3.11 or later, not {sys.version.split()[0]}")
