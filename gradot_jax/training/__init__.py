"""Training: the one loop with its checkpoints, signals and metrics, and the step of the adapter."""
