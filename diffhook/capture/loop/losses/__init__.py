"""Each row's own loss and timesteps, and what its passes show of the training loss."""
