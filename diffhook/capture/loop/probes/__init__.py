"""Probes of the training's own samples: their inputs, their ids, and the share of each process."""
