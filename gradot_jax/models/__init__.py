"""Model families; each folder holds one, and depends on `nn` and `files` alone."""
