"""Tests of step_optim/isolation."""
