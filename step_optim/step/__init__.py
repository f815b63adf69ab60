"""One step in progress: its owner, its ending, and what a run remembers between steps."""
