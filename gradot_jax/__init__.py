"""GradOT in JAX."""
