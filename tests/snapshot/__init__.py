"""Tests of step_optim/snapshot."""
