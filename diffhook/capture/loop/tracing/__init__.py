"""Whose rows the model is called on: rows of batches, followed through the loop's own operations."""
