"""Tests of `step_optim.report`."""
