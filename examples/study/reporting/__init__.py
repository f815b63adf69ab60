"""What makes the report of finished runs: checks, figures, contrasts, words, tables and pictures."""
