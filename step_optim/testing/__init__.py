"""Test an optimizer of your own: is a rejected step exactly undone, and does a shrunk one stay shrunk.

    from step_optim.testing import check_optimizer

    print(check_optimizer(lambda parameters: MyOptimizer(parameters, lr=1e-3)))

`examples/optimizer_table.py` does it for some 200 optimizers of other people.
"""

from step_optim.testing.check import check_optimizer
from step_optim.testing.probe import Factory, TrainStep, train_step
from step_optim.testing.verdict import Finding, Kind, Verdict

__all__ = ["Factory", "Finding", "Kind", "TrainStep", "Verdict", "check_optimizer", "train_step"]
