"""Tests of step_optim/control."""
