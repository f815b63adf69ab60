"""The demo: LoRA-PPO on a real language model, with STEP and without. `__main__` is where it begins."""
