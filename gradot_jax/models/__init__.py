"""Language models as pytrees and pure functions: families, splits, meshes, Hugging Face files."""
