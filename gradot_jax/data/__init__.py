"""Text and records from files or the hub, as token batches."""
