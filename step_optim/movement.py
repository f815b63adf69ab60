"""Movement: how far a policy moved, as one global number and one number per slice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from step_optim.precision import Precision, relative_error, upper_bound


class Unmeasured(ValueError):
    """A figure is asked for that the KL closure does not measure."""


@dataclass(frozen=True)
class Movement:
    """Mean KL(candidate ‖ previous) over a control set, in nats per token.

    The mean is taken per prompt first and then over prompts, so that a long
    response weighs as much as a short one (the paper's K_global and K_s,
    section 3.2).

    >>> moved = Movement(0.02, {"math": 0.01, "code": 0.03})
    >>> moved.worst
    ('code', 0.03)
    """

    mean: float
    """K_global, over all prompts [nats per token]."""

    slices: Mapping[str, float] = field(default_factory=dict)
    """K_s by slice name [nats per token]; empty if there are no slices."""

    prompt: float | None = field(default=None, repr=False, compare=False)
    """The largest KL of a prompt [nats per token]; None if the closure gave means only."""

    token: float | None = field(default=None, repr=False, compare=False)
    """The largest KL of a single response token [nats]; None if the closure measures none."""

    prompts: Sequence[float] | None = field(default=None, repr=False, compare=False)
    """KL of each control prompt that this process measured [nats per token]; None if the closure gave means only."""

    members: Mapping[str, Sequence[int]] = field(default_factory=dict, repr=False, compare=False)
    """Which of these prompts are in each slice."""

    spans: Mapping[str, Sequence[float]] = field(default_factory=dict, repr=False, compare=False)
    """KL of the tokens of a span of response positions, by name: one figure for each prompt that has any."""

    @staticmethod
    def everywhere(kl: float, slices: Iterable[str]) -> Movement:
        """Return one figure for the mean and for every slice.

        >>> Movement.everywhere(0.0, ["math"]).slices
        {'math': 0.0}
        """
        return Movement(kl, dict.fromkeys(slices, kl))

    @staticmethod
    def over(
        prompts: Sequence[float],
        members: Mapping[str, Sequence[int]],
        *,
        token: float | None = None,
        spans: Mapping[str, Sequence[float]] | None = None,
    ) -> Movement:
        """Return K_global and K_s from the KL of each prompt.

        The sums are exact before they are rounded: their bits do not depend on
        the order of the prompts, nor on how they are spread over processes.

        Args:
            prompts: KL of each prompt [nats per token].
            members: indices of the prompts in each slice.
            token: the largest KL of a token, if it is known.
            spans: KL of the tokens of a span, of each prompt that has any; a
                span is one more slice.

        >>> Movement.over([0.1, 0.3], {"a": [0]})
        Movement(mean=0.2, slices={'a': 0.1})
        """
        spans = spans or {}
        slices = {name: _mean([prompts[i] for i in indices]) for name, indices in members.items()}
        slices |= {name: _mean(kls) for name, kls in spans.items()}
        return Movement(_mean(prompts), slices, _largest(prompts), token, prompts, members, spans)

    @staticmethod
    def pooled(parts: Sequence[Movement], *, replicas: bool = False) -> Movement:
        """Return the movement over the control prompts of several processes; the plain mean where only means are known.

        Args:
            parts: what each process measured.
            replicas: whether all have measured the same prompts, so that each counts once. Equal figures of every
                prompt say so, too.

        >>> Movement.pooled([Movement.over([0.5], {"a": [0]}), Movement.over([0.25, 0.75], {"a": [1]})])
        Movement(mean=0.5, slices={'a': 0.625})
        """
        if len(parts) == 1:
            return parts[0]
        token = _largest([part.token for part in parts if part.token is not None])
        if any(part.prompts is None for part in parts):
            names = {name: None for part in parts for name in part.slices}
            slices = {name: _mean([part.slices[name] for part in parts if name in part.slices]) for name in names}
            return Movement(_mean([part.mean for part in parts]), slices, token=token)
        if replicas or all(part.prompts == parts[0].prompts for part in parts[1:]):
            spans_of = {name: _averages([part.spans[name] for part in parts]) for name in parts[0].spans}
            each = _averages([part.prompts or () for part in parts])
            return Movement.over(each, parts[0].members, token=token, spans=spans_of)
        prompts: list[float] = []
        members: dict[str, list[int]] = {}
        spans: dict[str, list[float]] = {}
        for part in parts:
            for name, indices in part.members.items():
                members.setdefault(name, []).extend(len(prompts) + i for i in indices)
            for name, kls in part.spans.items():
                spans.setdefault(name, []).extend(kls)
            prompts += part.prompts or ()
        return Movement.over(prompts, members, token=token, spans=spans)

    def upper(self, confidence: float, slice_: str | None = None) -> float:
        """Return the upper confidence bound of the mean, or of a slice, over all prompts like these.

        >>> Movement.over([0.01, 0.02, 0.03], {}).upper(0.95) > 0.02
        True

        Raises:
            ValueError: the KL of each prompt is not known.
        """
        return upper_bound(self._each(slice_), confidence)

    @property
    def precision(self) -> Precision:
        """Relative standard errors of the mean and of each slice over prompts.

        >>> str(Movement.over([0.01, 0.03], {"a": [0]}).precision)
        'mean ±50% (2 prompts), a ±inf% (1 prompts)'

        Raises:
            ValueError: the KL of each prompt is not known.
        """
        mean, each = self._each(None), {name: self._each(name) for name in self.slices}
        errors = {name: relative_error(kls) for name, kls in each.items()}
        return Precision(relative_error(mean), errors, len(mean), {name: len(kls) for name, kls in each.items()})

    def _each(self, slice_: str | None) -> Sequence[float]:
        """KLs of the prompts, or of those in a slice."""
        if self.prompts is None:
            raise Unmeasured(
                "this movement has means only, and the KL of each prompt is needed: use TokenKL or PolicyKL, or have "
                "the KL function return Movement.over([kl of each prompt], {slice: [prompts]}). Of a step that moved "
                "nothing, and of a record that was read back, only means are kept"
            )
        if slice_ is None:
            return self.prompts
        return self.spans[slice_] if slice_ in self.spans else [self.prompts[i] for i in self.members[slice_]]

    @property
    def worst(self) -> tuple[str, float]:
        """Name and KL of the slice that moved most; ``("mean", mean)`` without slices."""
        if not self.slices:
            return "mean", self.mean
        # A NaN slice is the worst of all, whatever max() would make of it.
        return max(self.slices.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])

    @property
    def largest(self) -> float:
        """The largest figure, mean or slice; NaN if one of them is."""
        figures = (self.mean, *self.slices.values())
        return math.nan if any(map(math.isnan, figures)) else max(figures)

    @property
    def is_finite(self) -> bool:
        """Whether every figure is a finite number."""
        return all(math.isfinite(kl) for kl in (self.mean, *self.slices.values()))

    def to_dict(self) -> dict[str, Any]:
        """The figures alone."""
        tails = {"prompt": self.prompt, "token": self.token}
        known = {name: value for name, value in tails.items() if value is not None}
        return {"mean": self.mean, "slices": dict(self.slices), **known}

    def still(self) -> Movement:
        """Return the movement of a policy that stayed where it was: zero wherever this one was measured."""
        token = None if self.token is None else 0.0
        if self.prompts is None:
            return Movement(0.0, dict.fromkeys(self.slices, 0.0), token=token)
        spans = {name: [0.0] * len(kls) for name, kls in self.spans.items()}
        return Movement.over([0.0] * len(self.prompts), self.members, token=token, spans=spans)

    @staticmethod
    def of(value: Any) -> Movement:
        """Read what a KL closure returned as a `Movement`.

        Args:
            value: a `Movement`; a number or 0-dim tensor (K_global); or a
                mapping slice -> number, whose key ``"mean"`` is K_global (the
                plain mean over slices if it has none).

        Raises:
            TypeError: ``value`` is none of these.
            ValueError: a tensor with more than one element, an empty mapping,
                or a negative KL. NaN and inf pass: they are measurements, and
                no budget allows them.

        >>> Movement.of({"math": 0.25, "code": 0.75}).mean
        0.5
        """
        if isinstance(value, Movement):
            read = {str(name): _number(kl, f"slice {name!r}") for name, kl in value.slices.items()}
            return replace(value, mean=_number(value.mean, "mean"), slices=read)
        if isinstance(value, Mapping):
            if not value:
                raise ValueError("KL closure returned an empty mapping; return at least {'mean': kl}")
            slices = {name: _number(kl, f"slice {name!r}") for name, kl in value.items() if name != "mean"}
            mean = value["mean"] if "mean" in value else sum(slices.values()) / len(slices)
        else:
            mean, slices = value, {}
        mean = _number(mean, "mean")
        return Movement(mean, {str(name): _number(kl, f"slice {name!r}") for name, kl in slices.items()})


def _number(value: Any, what: str) -> float:
    """Read one KL: a real number or a tensor of one element, not negative."""
    value = value.detach() if hasattr(value, "detach") else value
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(
            f"KL closure returned {type(value).__name__} {value!r:.60} for {what}; return a number, a 0-dim "
            "tensor, a mapping slice -> number, or a Movement"
        )
    shape = tuple(getattr(value, "shape", ()))
    if math.prod(shape) != 1:
        raise ValueError(
            f"KL closure returned shape {shape} for {what}; reduce it to one number (per prompt, then over prompts)"
        )
    try:
        kl = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"KL closure returned {value!r:.60} for {what}: {error}") from error
    if kl < 0:
        raise ValueError(
            f"KL closure returned {kl} for {what}; a KL is never negative. For rounding noise return "
            "max(kl, 0); a sampled log-ratio is not a KL: use the full distributions, or the k3 estimator"
        )
    return kl


def _largest(values: Sequence[float]) -> float | None:
    """The largest of some; NaN if one of them is; None of none."""
    return math.nan if any(map(math.isnan, values)) else max(values, default=None)


def _averages(parts: Sequence[Sequence[float]]) -> list[float]:
    """The mean of several processes' figures, one by one."""
    return [values[0] if len(set(values)) == 1 else _mean(values) for values in zip(*parts, strict=True)]


def _mean(values: Sequence[float]) -> float:
    """The correctly rounded sum over the count; NaN and inf as addition has them. 0 if this process has no prompt."""
    try:
        total = math.fsum(values)
    except (OverflowError, ValueError):  # a sum beyond float64, or inf - inf
        total = sum(values)
    return total / len(values) if values else 0.0
