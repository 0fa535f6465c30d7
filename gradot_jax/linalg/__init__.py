"""Linear algebra in float32: decompositions, least squares, compensated sums."""
