"""Controllers: what happens to a candidate that is over budget."""

from step_optim.controllers.base import Action, Controller, Outcome, Point, Trial
from step_optim.controllers.gate import Gate, GateStalled
from step_optim.controllers.interpolate import Interpolate
from step_optim.controllers.project import Project

__all__ = [
    "Action",
    "Controller",
    "Gate",
    "GateStalled",
    "Interpolate",
    "Outcome",
    "Point",
    "Project",
    "Trial",
]
