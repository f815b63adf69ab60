"""Everything that can be put back: weights, the optimizer's state, gradients, group values, copies of the weights."""

from step_optim.snapshot.weights import Update, Weights

__all__ = ["Update", "Weights"]
