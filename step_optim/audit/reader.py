"""Reading response rows from a causal language model, in the shortest way that agrees with its own logits."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from step_optim.audit.batches import Batch
from step_optim.audit.given_models import logits_beside
from step_optim.audit.language_models import accepted_arguments, logits_of, output_head
from step_optim.audit.recompute import check_recomputed, checked_recompute, checkpoints, recomputed
from step_optim.audit.rows import Head
from step_optim.host.modules import has_fsdp, plain, reshard
from step_optim.host.undo import inserted
from step_optim.isolation.module_state import ModuleState
from step_optim.isolation.stand_ins import standing_in

HEAD_TOLERANCE = 1e-3
"""Largest relative difference between a model's logits and a plain linear head's at which they count as one."""

LARGE_LOGIT = 1e3
"""Size to which logits are blown up for the comparison of heads: soft-capping is invisible on small ones."""


KEEP_NOTHING = ("torch", "transformers", "peft")
"""Libraries whose modules keep no tensor from one forward to the next, but in buffers, which an audit puts back.

A table that any other module computed in inference mode, and kept, would break its next backward pass.
"""


class Reading:
    """How one model is read.

    Args:
        model: a causal language model.
        dtype: that its weights are cast to meanwhile; None leaves them.
        state: what its modules held at first; every forward begins with that.
        recompute: whether backward passes compute again what layers did; None
            lets the model decide.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype | None, state: ModuleState, recompute: bool | None = None
    ) -> None:
        self.model, self.dtype, self._state = model, dtype, state
        self._recompute = checked_recompute(plain(model), recompute)
        self.readout = "full"
        """"hidden" (plain linear head), "rows" (the model's own head on response rows) or "full"."""
        self.sharded = has_fsdp(model)
        """Whether a forward gathers weights from other processes."""
        self._inference = not self.sharded and all(_library(module) in KEEP_NOTHING for module in model.modules())
        self._arguments = accepted_arguments(model)
        self.recomputing = False
        """Whether it is so now."""
        self._originals: Mapping[int, Mapping[str, Any]] = {}

    @property
    def takes_past(self) -> bool:
        """Whether the model goes on from what it remembers of earlier tokens."""
        return "past_key_values" in self._arguments

    @property
    def recomputes(self) -> bool:
        """Whether backward passes compute again what layers did, as the model perhaps does while it trains."""
        return checkpoints(plain(self.model)) if self._recompute is None else self._recompute

    @contextmanager
    def recomputed(self) -> Iterator[None]:
        """Have it so, if it is to be; both passes are inside."""
        self.recomputing = self.recomputes
        try:
            with recomputed(plain(self.model)) if self.recomputing else nullcontext():
                yield
        finally:
            self.recomputing = False

    def check_recomputed(self, batch: Batch, weights: Sequence[Tensor]) -> None:
        """Refuse layers that cannot be computed again, if it was asked for; see `check_recomputed`."""
        if self._recompute and weights and not self.sharded:
            with torch.enable_grad(), self.cast():
                check_recomputed(plain(self.model), lambda: self.rows(batch), weights)

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, D] and bias [V] of the output head, as they are trained."""
        module = output_head(self.model)
        parameters = self._originals.get(id(module), module._parameters)
        return parameters["weight"], parameters.get("bias")

    @contextmanager
    def cast(self, replaced: Mapping[int, Tensor] | None = None) -> Iterator[None]:
        """Let the model compute with weights of `dtype` in the place of its own; gradients reach these.

        Args:
            replaced: tensors to use in the place of parameters with these ids.
        """
        with standing_in(self.model.modules(), self._casts(replaced or {})) as self._originals:
            yield

    def _casts(self, given: Mapping[int, Tensor]) -> dict[int, Tensor]:
        if not given and self.dtype is None:
            return {}
        wanted = [p for p in self.model.parameters() if id(p) in given or self._castable(p)]
        return {id(p): given.get(id(p), p).to(self.dtype) if self._castable(p) else given[id(p)] for p in wanted}

    def _castable(self, parameter: Tensor) -> bool:
        return self.dtype is not None and parameter.is_floating_point() and parameter.dtype != self.dtype

    def past(self, prefix: Tensor) -> Any:
        """What the model remembers of a prefix [1, P]; None of an empty one."""
        if prefix.shape[1] == 0:
            return None
        first = torch.zeros(1, dtype=torch.long, device=prefix.device)
        with self._mode(), _head_on_rows(output_head(self.model), first, prefix.shape[1], one=True):
            mask = torch.ones_like(prefix)
            return self._forward(prefix, attention_mask=mask, use_cache=True).past_key_values

    def rows(
        self, batch: Batch, past: Any = None, *, readout: str | None = None, probe: Tensor | None = None
    ) -> Tensor:
        """[r, D] hidden states or [r, V] logits of one batch's response rows.

        Args:
            batch: what to read.
            past: of the prefix that was cut off it.
            readout: another way than `readout`.
            probe: hidden states to put in the place of the model's own.
        """
        readout = readout or self.readout
        width = batch.ids.shape[1]
        with self._mode():
            if readout == "full":
                out = self._call(batch, past)
                logits = logits_of(out, batch.ids)[:, -width:] if batch.given is None else logits_beside(out, batch.ids)
                return rearrange(logits, "b t v -> (b t) v")[batch.positions]
            one = readout == "hidden"
            with _head_on_rows(output_head(self.model), batch.positions, width, one=one, probe=probe) as tap:
                out = self._call(batch, past)
            return tap.hidden if one else logits_of(out, batch.positions[None, :0])[0]

    def _call(self, batch: Batch, past: Any) -> Any:
        if batch.given is not None:
            return self._forward(given=self._as_cast(batch.given.arguments), use_cache=False)
        options: dict[str, Any] = {"attention_mask": batch.mask, "use_cache": False}
        if past is not None:
            options |= {"past_key_values": _fork(past, len(batch.ids)), "use_cache": True}
        return self._forward(batch.ids, **options)

    def _mode(self) -> AbstractContextManager[Any]:
        # Not inference_mode(False), which switches autograd on.
        return torch.inference_mode() if self._inference and not torch.is_grad_enabled() else nullcontext()

    def _as_cast(self, arguments: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Pictures and sound in the dtype that weights are cast to."""
        dtype = self.dtype
        if dtype is None:
            return arguments
        return {name: t.to(dtype) if t.is_floating_point() else t for name, t in arguments.items()}

    def _forward(self, *ids: Tensor, given: Mapping[str, Tensor] | None = None, **options: Any) -> Any:
        self._state.reset()
        while True:
            taken = {name: value for name, value in options.items() if name in self._arguments}
            try:
                return plain(self.model)(*ids, **(given or {}), **taken)
            except TypeError as error:  # a signature with **kwargs promises what the model inside may not take
                refused = [name for name in taken if f"unexpected keyword argument '{name}'" in str(error)]
                if not refused:
                    raise
                self._arguments.remove(refused[0])

    def find_readout(self, batch: Batch, truth: Tensor) -> str | None:
        """Compare the short ways with the model's own logits on one batch, and take the shortest that agrees.

        Returns:
            Why it is not the hidden states; None if it is.
        """
        head = output_head(self.model)
        if head is None or not agree(self._try_rows(batch), truth):
            self.readout = "full"
            return "the model's head cannot be run on some rows alone: logits [B, T, V] of whole batches are computed"
        self.readout = "rows"
        for module in self.model.modules():
            reshard(module)
        if hasattr(getattr(head, "weight", None), "placements"):
            return "under FSDP2 the whole head is there in a forward only: logits [R, V] are kept"
        if type(head) is not nn.Linear or head.weight.shape[0] != truth.shape[-1]:
            return f"the head is no plain nn.Linear but {type(head).__name__}: logits [R, V] are kept"
        straight = Head(head.weight.float(), None if head.bias is None else head.bias.float())
        # Soft-capping and scaling show themselves on large logits only.
        probe = torch.randn_like(self.rows(batch, readout="hidden"))
        probe *= LARGE_LOGIT / max(float(straight(probe.float()).abs().max()), 1e-6)
        large = self.rows(batch, readout="rows", probe=probe)
        same = agree(straight(self.rows(batch, readout="hidden").float()), truth)
        if not same or not agree(straight(probe.float()), large):
            return "the model scales, caps or masks what its head returns: logits [R, V] are kept"
        self.readout = "hidden"
        return None

    def _try_rows(self, batch: Batch) -> Tensor | None:
        try:
            return self.rows(batch, readout="rows")
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError):
            return None  # a model that does more with its head's output than pass it on


def _library(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]


def _fork(past: Any, count: int) -> Any:
    """The cache of ``count`` equal prompts; a forward that appends to it leaves the one given as it is."""
    mine = copy.copy(past)
    for name, value in vars(mine).items():
        if isinstance(value, list):
            setattr(mine, name, [item if isinstance(item, Tensor) else copy.copy(item) for item in value])
    mine.batch_repeat_interleave(count)
    return mine


class _Tap:
    """What the head was given."""

    hidden: Tensor


@contextmanager
def _head_on_rows(
    head: nn.Module | None, positions: Tensor, width: int, *, one: bool, probe: Tensor | None = None
) -> Iterator[_Tap]:
    """Let the model's head see some rows only: [B, T, D] becomes [1, r, D].

    The model's own code then applies whatever it applies to its logits.
    ``width`` is T; a model that puts tokens of its own before them (prompt
    tuning) has more. ``one`` leaves it a single row to chew on.
    """
    tap = _Tap()

    def select(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = rearrange(inputs[0][:, -width:], "b t d -> (b t) d")[positions]
        tap.hidden = hidden if probe is None else probe.to(hidden.dtype)
        return (tap.hidden[None, : 1 if one else None], *inputs[1:])

    if head is None:
        yield tap
        return
    with inserted(select, head._forward_pre_hooks):
        yield tap


def agree(logits: Tensor | None, truth: Tensor, tolerance: float = HEAD_TOLERANCE) -> bool:
    """Whether two tensors of logits are equal but for rounding, relative to the largest of them."""
    if logits is None or logits.shape != truth.shape:
        return False
    rounding = max(torch.finfo(logits.dtype).eps, torch.finfo(truth.dtype).eps)
    return difference(logits, truth) <= max(tolerance, 4 * rounding)


def difference(logits: Tensor, truth: Tensor) -> float:
    """The largest difference between two tensors of logits, relative to the largest logit; NaN if only one has NaN."""
    logits, truth = logits.float(), truth.float()
    same = (logits == truth) | (logits.isnan() & truth.isnan())  # masked tokens have -inf in both
    size = torch.where(truth.isfinite(), truth, 0.0).abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float(torch.where(same, 0.0, logits - truth).abs().max() / size)
