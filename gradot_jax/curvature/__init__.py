"""Kronecker factors and gradients of a model, one layer at a time."""
