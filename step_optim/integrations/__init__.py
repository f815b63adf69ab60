"""STEP inside training frameworks: a callback for the Hugging Face Trainer, and one for Lightning.

Each is in a file of its own, which imports its framework:
`step_optim.integrations.trainer` and `step_optim.integrations.lightning`.
"""
