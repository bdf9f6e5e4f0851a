"""One YAML a run; `schema.py` says what may stand in it."""
