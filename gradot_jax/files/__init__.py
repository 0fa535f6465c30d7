"""Files on disk: tensors, strict JSON and folders that appear whole or not at all."""
