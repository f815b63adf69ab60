"""STEP inside training frameworks: a callback for the Hugging Face Trainer, one for Lightning, one for SB3.

Each is in a file of its own, which imports its framework: `step_optim.hosts.trainer`,
`step_optim.hosts.lightning` and `step_optim.hosts.sb3` (stable-baselines3, sb3-contrib).
"""
