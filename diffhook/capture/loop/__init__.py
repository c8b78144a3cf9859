"""The training loop as a contract: its events, one micro-batch, and the session that follows it."""
