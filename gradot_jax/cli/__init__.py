"""The `gradot` program: one module a command, each without JAX until it runs."""
