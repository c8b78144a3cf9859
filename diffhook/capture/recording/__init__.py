"""From captured passes to the log: rows, snapshots, probes at them, and the preconditioner."""
