"""PPO with a trust region after the optimizer, against those that people use."""
