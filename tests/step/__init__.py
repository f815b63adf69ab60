"""Tests of step_optim/step."""
