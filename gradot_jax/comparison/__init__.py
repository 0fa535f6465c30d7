"""All methods on the same model, text and tasks: what each ships, keeps and is worth."""
