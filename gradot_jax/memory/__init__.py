"""What a run will take of memory, and what there is."""
