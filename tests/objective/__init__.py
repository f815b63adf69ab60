"""Tests of step_optim/objective."""
