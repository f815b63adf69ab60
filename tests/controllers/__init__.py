"""Tests of step_optim/controllers."""
