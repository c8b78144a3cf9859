"""Probes: gradients of chosen samples at a snapshot, on a sparse grid of timesteps with fixed noise."""
