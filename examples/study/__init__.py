"""The study: post-step controllers against KL penalties. `__main__` is where it begins, `config` what it is."""
