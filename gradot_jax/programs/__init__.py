"""What is compiled: every program of the pipeline, from shapes alone, for whatever chips."""
