"""Layers as pure functions on arrays: linear maps, norms, attention, loss and factor taps."""
