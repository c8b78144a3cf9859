"""The run as a whole: what identifies it, its processes and checkpoints, and what is said of it."""
