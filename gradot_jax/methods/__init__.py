"""The compression methods: one record each in `table.py`, one file or folder each beside it."""
