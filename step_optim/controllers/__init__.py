"""Controllers: what happens to a candidate that is over budget."""

from step_optim.controllers.base import Action, Controller, Outcome, Point, Trial
from step_optim.controllers.gate import Gate, GateStalled
from step_optim.controllers.interpolate import Interpolate
from step_optim.controllers.project import Project
from step_optim.controllers.searches import Backtracking, Bisection, ModelSearch, Search
from step_optim.controllers.steer import Steer

__all__ = [
    "Action",
    "Backtracking",
    "Bisection",
    "Controller",
    "Gate",
    "GateStalled",
    "Interpolate",
    "ModelSearch",
    "Outcome",
    "Point",
    "Project",
    "Search",
    "Steer",
    "Trial",
]
