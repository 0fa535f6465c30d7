"""OPT: configuration, parameters, forward pass and Hugging Face files."""
