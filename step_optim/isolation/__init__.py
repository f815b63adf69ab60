"""A measurement leaves no trace and reads none: what modules hold is put back, and put aside."""

from step_optim.isolation.eval_mode import isolated
from step_optim.isolation.module_state import ModuleState

__all__ = ["ModuleState", "isolated"]
