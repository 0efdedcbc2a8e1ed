"""Development commands. See `tools/dev.py`."""
