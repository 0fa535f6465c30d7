"""What is compiled: the jitted programs of the pipeline, from shapes alone, for whatever chips."""
