"""What makes the runs: the model and its prompts, the training loop, the branches, and the workers."""
