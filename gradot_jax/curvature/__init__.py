"""Kronecker factors, and the taps whose cotangents they are."""
