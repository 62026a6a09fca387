"""The token index ``PREFIX.bin``, ``PREFIX.idx``, ``PREFIX.json``: its format, its reader and its writers."""
