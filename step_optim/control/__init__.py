"""Control sets: fixed prompts and responses that movement is measured on."""

from step_optim.control.control_set import ControlSet

__all__ = ["ControlSet"]
