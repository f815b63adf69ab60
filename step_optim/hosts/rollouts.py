"""What a policy of stable-baselines3 is measured on, and how its action distribution is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent

Drawn = dict[str, Any]
"""Observations of a rollout: ``"obs"``, and what else the policy is given; all [N, ...]."""


def drawn(buffer: Any, count: int, seed: Sequence[int]) -> Drawn:
    """Draw observations of a rollout buffer, with the action masks and recurrent states that belong to them.

    A recurrent policy gets whole sequences: all steps of as many environments as come nearest to the count, one at
    least, each from the state that the rollout began with. No global random stream is touched.

    Args:
        buffer: a RolloutBuffer that is full.
        count: how many; all of them if there are no more.
        seed: of the draw.
    """
    index = _index(buffer, *places(buffer, count, np.random.default_rng(seed)))
    taken = {"obs": buffer.observations} | {
        name: getattr(buffer, name) for name in ("action_masks", "episode_starts") if hasattr(buffer, name)
    }
    if _is_recurrent(buffer):
        taken |= {name: _states(buffer, name) for name in ("hidden_states_pi", "cell_states_pi")}
    else:
        taken.pop("episode_starts", None)
    return {name: _rows(buffer, value, index) for name, value in taken.items()}


def _states(buffer: Any, name: str) -> Any:
    """States of every step: [T, layers, envs, hidden] at first, while all else has the environments second."""
    states = getattr(buffer, name)
    return states if buffer.generator_ready else np.swapaxes(states, 1, 2)


def places(buffer: Any, count: int, random: np.random.Generator) -> tuple[Any, Any]:
    """Choose steps [N] and environments [N]; those of a sequence one after the other."""
    length, envs = buffer.buffer_size, buffer.n_envs
    if not _is_recurrent(buffer):
        chosen = np.sort(random.permutation(length * envs)[:count])
        return np.divmod(chosen, envs)
    sequences = min(envs, max(1, round(count / length)))
    some = np.sort(random.permutation(envs)[:sequences])
    return np.tile(np.arange(length), sequences), np.repeat(some, length)


def _is_recurrent(buffer: Any) -> bool:
    return hasattr(buffer, "hidden_states_pi")


def _index(buffer: Any, steps: Any, envs: Any) -> tuple[Any, ...]:
    """Where they are: [T, envs, ...], which the first pass over a buffer makes [envs * T, ...]."""
    return (envs * buffer.buffer_size + steps,) if buffer.generator_ready else (steps, envs)


def _rows(buffer: Any, value: Any, index: tuple[Any, ...]) -> Any:
    if isinstance(value, dict):
        return {name: _rows(buffer, part, index) for name, part in value.items()}
    return buffer.to_torch(value[index])


def policy_of(policy: Any, length: int) -> Callable[[Drawn], Distribution]:
    """Return the function of observations that `PolicyKL` measures.

    Args:
        policy: an actor-critic policy.
        length: T, steps of a sequence of a recurrent one.
    """

    def distribution(seen: Drawn) -> Distribution:
        if "hidden_states_pi" in seen:
            # [n * T, layers, hidden] of every step -> [layers, n, hidden] of the first ones
            first = [
                seen[name][::length].transpose(0, 1).contiguous() for name in ("hidden_states_pi", "cell_states_pi")
            ]
            found, _ = policy.get_distribution(seen["obs"], tuple(first), seen["episode_starts"])
        elif "action_masks" in seen:
            found = policy.get_distribution(seen["obs"], action_masks=seen["action_masks"])
        else:
            found = policy.get_distribution(seen["obs"])
        return torch_distribution(found)

    return distribution


def _first(states: Tensor, length: int) -> Tensor:
    """States of every step, [n * T, layers, hidden] -> [layers, n, hidden] of the first ones."""
    return states[::length].transpose(0, 1).contiguous()


def torch_distribution(found: Any) -> Distribution:
    """Return what is inside a distribution of stable-baselines3, with batch shape [N].

    A squashed Gaussian is read before the tanh, which leaves its KL as it is; gSDE as the Gaussian that one action
    has, given its observation.

    Raises:
        TypeError: there is no distribution of torch's in it.

    >>> from stable_baselines3.common.distributions import MultiCategoricalDistribution
    >>> two = MultiCategoricalDistribution([2, 3]).proba_distribution(torch.zeros(4, 5))
    >>> torch_distribution(two)
    Independent(Categorical(logits: torch.Size([4, 2, 3])), 1)
    """
    inside = getattr(found, "distributions", None) or getattr(found, "distribution", None)
    if isinstance(inside, (list, tuple)) and inside and all(isinstance(part, Categorical) for part in inside):
        return Independent(Categorical(logits=_side_by_side([part.logits for part in inside])), 1)
    if not isinstance(inside, Distribution):
        raise TypeError(
            f"the policy's {type(found).__name__} has no distribution of torch.distributions inside, so that its KL "
            "has no closed form here; give it one as its attribute 'distribution'"
        )
    factors = len(inside.batch_shape) - 1
    return Independent(inside, factors) if factors > 0 else inside


def _side_by_side(logits: Sequence[Tensor]) -> Tensor:
    """Logits [N, A_k] of several factors as [N, K, max A]: choices that a factor does not have get none."""
    most = max(part.shape[-1] for part in logits)
    pad = torch.nn.functional.pad
    return torch.stack([pad(part, (0, most - part.shape[-1]), value=-torch.inf) for part in logits], dim=1)
