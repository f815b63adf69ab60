"""One step's snapshot: theta_t and all that belongs to it, the candidate, and any point between the two."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

from torch import Tensor, nn
from torch.optim import Optimizer

from step_optim.host.rng import RNGState
from step_optim.host.undo import uninterrupted
from step_optim.snapshot.copies import Copies
from step_optim.snapshot.groups import GroupJournal
from step_optim.snapshot.known import ParamLike
from step_optim.snapshot.path import Path
from step_optim.snapshot.rounding import Rounding
from step_optim.snapshot.state import OptimizerState
from step_optim.snapshot.weights import Update, Weights


class Snapshot:
    """Everything that a step may change, captured at theta_t, and put back or moved as one.

    It covers the weights, the copies of weights that the optimizer keeps, its
    state, attributes and group values, gradients, the buffers of some modules,
    and the random streams. Only this object writes weights. One of them serves
    all steps of an optimizer: its memory is allocated once.

    Args:
        optimizer: the inner optimizer.
        host: keep the copies of a CUDA device's tensors in pinned host memory.
        param_like: where the optimizer keeps copies of the weights.
    """

    def __init__(self, optimizer: Optimizer, *, host: bool = False, param_like: ParamLike = ()) -> None:
        self._weights, self._state = Weights(optimizer, host=host), OptimizerState(optimizer, host=host)
        self._copies = Copies(optimizer, self._weights, self._state, param_like)
        self._rng: RNGState | None = None
        self._path: Path | None = None
        """The way to the candidate; None if it is the straight line."""
        self._spared: tuple[Tensor, ...] = ()
        """Parameters that stay at the candidate."""

    # -- theta_t ------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin a new step: until `capture_rest` is done, there is nothing to restore."""
        self._rng = self._path = None
        self.spare(())

    def capture_weights(self) -> bool | Tensor:
        """Take the current weights as theta_t.

        Returns:
            Whether they are others, in any bit, than those of the latest `remember`; a tensor if only an accelerator
            can tell, later.
        """
        return self._weights.capture()

    def capture_rest(self, modules: Iterable[nn.Module]) -> None:
        """Capture all else, and the buffers of these modules. From here on there is something to restore."""
        self._state.capture(b for module in modules for b in module._buffers.values() if b is not None)
        self._copies.mark()
        self._rng = RNGState.capture()  # last: `restore` takes it for the sign that all of it is captured

    def watch_groups(self) -> GroupJournal:
        """Return a context; group values that change inside it are rolled back by `restore`, others are not."""
        return self._state.watch_groups()

    def restore(self, *, keep_state: bool = False, rewind: bool = True) -> None:
        """Put theta_t and all that belongs to it back, bit for bit; an interrupt is raised when that is done.

        Args:
            keep_state: leave the optimizer's own state as the step made it.
            rewind: put the random streams back, too.
        """
        rng = self._rng
        if rng is None:  # nothing has moved yet
            return

        def undo() -> None:
            self._weights.restore()
            if keep_state:
                self._copies.go(0)
            self._state.restore(keep_state=keep_state)
            if rewind:
                rng.restore()

        self.spare(())
        uninterrupted(undo)

    def reject(self, *, keep_state: bool = False, rewind: bool = True) -> None:
        """`restore` all but what is spared: that keeps the candidate's weights and state.

        Raises:
            CannotKeep: the step has changed state that belongs to it and others together; nothing has moved then.
        """
        if not self._spared:
            self.restore(keep_state=keep_state, rewind=rewind)
            return
        rng, own = self._rng, None if keep_state else self._state.entries(self._spared)
        assert rng is not None

        def undo() -> None:
            self._weights.go(0)
            if keep_state:
                self._copies.go(0)
            self._state.restore(keep_state=keep_state, but=own)
            if rewind:
                rng.restore()

        uninterrupted(undo)

    def restore_weights(self) -> None:
        """Put back the weights alone; what is spared stays at the candidate."""
        self._weights.restore()
        self._weights.put_spared()

    def restore_state(self) -> None:
        """Put back what belongs to the optimizer, and leave weights, gradients and buffers as they are.

        What is spared keeps its state.

        Raises:
            CannotKeep: as `reject`.
        """
        self._state.restore_optimizer(self._state.entries(self._spared) if self._spared else None)

    def remember(self, *, as_proposed: bool) -> None:
        """Keep the current weights: the next `capture_weights` tells whether somebody else has written them.

        Args:
            as_proposed: these are the candidate's, of which there may be a copy already.
        """
        self._weights.remember(as_proposed=as_proposed)

    def release(self) -> None:
        """Let go of the gradients, which would keep their memory through the next backward pass."""
        self._state.release()

    # -- the candidate ------------------------------------------------------------------------------------------------

    def update(self) -> Update:
        """Compare the current weights with theta_t."""
        return self._weights.update()

    def keep_candidate(self) -> None:
        """Remember the current weights, and the copies of them, as the candidate; once a step."""
        self._weights.keep_candidate()
        self._copies.keep_candidate()

    def copied_aside(self) -> AbstractContextManager[None]:
        """Return a context for an audit, beside which the candidate is copied to the host."""
        return self._weights.copied_aside()

    @property
    def previous(self) -> list[Tensor]:
        """theta_t, a tensor for each piece of memory. To be read."""
        return self._weights.previous

    @property
    def candidate(self) -> list[Tensor]:
        """What the inner step proposed, in the same order. To be read."""
        return self._weights.candidate

    def proposal(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (theta_t, the candidate), tensor by tensor, once a step is decided. To be read.

        After a commit nobody need have kept the candidate: the weights are it.
        """
        return self._weights.proposal()

    @property
    def way(self) -> list[float] | None:
        """How early each tensor of `previous` arrives at the candidate; None on the straight line."""
        return None if self._path is None else self._path.weights

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters themselves, in the same order, for autograd."""
        return self._weights.parameters

    # -- what is spared -----------------------------------------------------------------------------------------------

    def spare(self, parameters: Sequence[Tensor]) -> None:
        """From here to the end of the step, let some parameters stay at the candidate, which is known.

        Wherever weights are written, these are the candidate's, and so are their copies. Only `restore` does not
        spare them.

        Args:
            parameters: objects in the optimizer's groups, with all that they share memory with.
        """
        self._spared = tuple(parameters)
        self._weights.spare(parameters)

    def check_apart(self, parameters: Sequence[Tensor]) -> None:
        """Refuse parameters whose state is not theirs alone, as far as the inner step has shown.

        Raises:
            CannotKeep: the step has changed state that belongs to them and others together.
        """
        self._state.entries(parameters)

    def places(self) -> list[list[int]]:
        """Where the parts of each of the optimizer's parameters are in `previous`, group after group."""
        return self._weights.places()

    @property
    def spared(self) -> list[int]:
        """The places in `previous` of what stays at the candidate."""
        return self._weights.spared

    @property
    def spared_is_finite(self) -> bool:
        """Whether the update of all that is spared is finite."""
        return self._weights.spared_is_finite

    def moved(self) -> bool:
        """Whether any weight that is not spared has other bits than at theta_t."""
        return self._weights.moved()

    # -- points -------------------------------------------------------------------------------------------------------

    def bend(self, path: Path) -> None:
        """Go to the candidate by another way, until the next step begins."""
        self._path = path

    def parts(self, alpha: float) -> list[float]:
        """Return which part of its step each tensor of `previous` has made at alpha, on the way that was bent."""
        assert self._path is not None
        spared = set(self.spared)
        return [1.0 if i in spared else part for i, part in enumerate(self._path.parts(alpha))]

    def go(self, alpha: float) -> None:
        """Write theta_t + alpha (candidate - theta_t), with the candidate's state; copies of the weights move along.

        What is spared stays at the candidate.
        """
        parts = alpha if alpha in (0, 1) or self._path is None else self._path.parts(alpha)
        self._weights.go(parts)
        self._copies.go(parts)

    def write(self, values: Sequence[Tensor]) -> None:
        """Write weights off the line, a tensor for each of `previous`; copies of them move along."""
        self._weights.write(values)
        self._copies.follow()

    def digest(self) -> int:
        """A number that tells the current weights from others."""
        return self._weights.digest()

    def alignment(self, *, spared: bool = True) -> tuple[float, float]:
        """<current - theta_t, candidate - theta_t> and ‖candidate - theta_t‖², with or without what is spared."""
        return self._weights.alignment(spared=spared)

    def inner(self, pairs: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> list[float]:
        """<a, b> of pairs of points, a tensor for each of `previous`; counted as in `update`."""
        return self._weights.inner(pairs)

    def squares(self) -> list[float]:
        """‖candidate - theta_t‖² of each of `previous`; 0 of what is spared."""
        return self._weights.squares()

    def descent(self) -> tuple[float, float]:
        """First-order decrease of the loss by the current weights and by the candidate: -<g, x - theta_t>."""
        return self._weights.descent()

    @property
    def is_coarse(self) -> bool:
        """Whether rounding leaves few points between theta_t and the candidate; known with the candidate."""
        return self._weights.is_coarse and not self._copies.round_weights

    def rounding(self) -> Rounding:
        """Return what tells how rounding changes parts of the update."""
        return Rounding(self._weights, self._path)

    def names(self, named: Mapping[str, Tensor]) -> dict[str, int | None]:
        """Where named parameters are in `previous`; None of those that the optimizer does not move."""
        return self._weights.names(named)
