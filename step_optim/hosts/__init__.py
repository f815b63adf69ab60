"""STEP inside training frameworks: a callback for the Hugging Face Trainer, and one for Lightning.

Each is in a file of its own, which imports its framework:
`step_optim.hosts.trainer` and `step_optim.hosts.lightning`.
"""
