"""Compression methods, one file each: `compress(problem)` yields an outcome."""
