"""The clean samples of a batch: where a loop's batches hold them, and what they look like."""
