"""Tests of step_optim/audit."""
