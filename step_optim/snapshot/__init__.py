"""Everything that can be put back, behind one object: `Snapshot`."""

from step_optim.snapshot.snapshot import Snapshot
from step_optim.snapshot.weights import Update, Weights

__all__ = ["Snapshot", "Update", "Weights"]
