"""Tests of step_optim/telemetry."""
