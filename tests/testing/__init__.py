"""Tests of step_optim/testing."""
