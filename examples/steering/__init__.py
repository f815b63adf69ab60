"""A task learned inside a cap on the drift."""
