"""TokenKL: movement of a causal language model on a control set."""

from __future__ import annotations

import copy
import logging
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from step_optim.audit import noise
from step_optim.audit.batches import Layout, Shard, layouts_of, micro_batch_of, prefix_of
from step_optim.audit.closure import Audit, Draw, KLClosure, Normal
from step_optim.audit.draws import checked_apart, checked_every
from step_optim.audit.given_models import as_read_by
from step_optim.audit.given_ways import find_given_ways
from step_optim.audit.language_models import (
    check_audit_dtype,
    check_device,
    check_known,
    check_logits,
    check_model,
    vocab_size_of,
)
from step_optim.audit.logit_kl import LogitKL
from step_optim.audit.readable import read_checked
from step_optim.audit.reader import Reading
from step_optim.audit.recompute import FEWER_AT_ONCE
from step_optim.audit.rows import Head, Rows, Scratch
from step_optim.audit.saved_rows import rows_from_state, state_of_rows, take_origins
from step_optim.audit.shortcuts import Ways, find_ways
from step_optim.audit.spans import Span, check_names, checked_spans, find_spans
from step_optim.control.control_set import ControlBatches, ControlSet
from step_optim.host.modules import has_fsdp, plain, reshard
from step_optim.movement import Movement

LOGGER = logging.getLogger("step_optim")


class TokenKL(LogitKL):
    """KL per response token of a language model, over the full vocabulary (the paper's section 3.2).

    It owns its reference: the audit that licensed a commit becomes the
    reference of the next step, so that a committed step costs one forward over
    the control set. The tokens that all prompts begin with (a chat template's)
    run once, through the model's own cache; the head runs on response positions
    only. With a plain linear head only hidden states are kept ([R, D]), and the
    vocabulary is streamed in blocks; with any other head the response rows'
    logits are kept ([R, V]). All of this is compared here with the model's own
    logits of each prompt alone, once with the trained weights moved away from
    where they begin (an adapter that is still 0 would agree with anything), and
    again when modules or what is trained have changed; `readout`,
    `prefix_tokens` and `fallbacks` say what was found.

    Args:
        model: a causal language model: ``model(input_ids)`` returns logits
            [B, T, V] or an object with ``.logits``. PEFT, DDP and compiled
            models are fine. Any model with a row of logits for each label, if
            the control set is of batches (`ControlSet.from_batches`).
        control: the control set, on the model's device.
        micro_batch: prompts evaluated at once; by default 4 on a CPU, 16384
            tokens' worth elsewhere. The layout is frozen at construction: the
            same batches in the same order make zero movement read exactly 0.
            Batches that were given are evaluated as they are.
        prefix: whether to share the common prefix; by default if it is worth a
            forward of its own.
        audit_dtype: what the weights are cast to in audits; by default they
            stay as they are. float32 lets a bf16 model be audited below bf16's
            noise (an audit then holds a float32 copy of the weights).
        noise_floor: whether to measure `noise_floor` here, with some eight
            evaluations of the control set.
        check_parameters: refuse an optimizer with parameters that the model
            does not have. False for a value head that the policy does not read.
        recompute: whether gradients (`Steer`'s) keep each layer's input alone,
            a quarter of a micro-batch at once, and compute the rest again: much
            less memory, and more time. By default if the model does so itself
            in training (gradient checkpointing).
        shard: under torch.distributed, let every process evaluate a part of
            the control set: True for all processes, or a ProcessGroup. Every
            process is given the whole set; the KLs are put together before
            anything is decided.
        spans: response positions as further slices, (start, stop) by name as in
            a Python slice: ``{"opening": (0, 5)}`` is the mean over the first
            five tokens of every response. Prompts without a token there are
            left out.
        pool: further prompts with their responses, which no audit reads:
            `Steer` draws directions from them. Directions that come from the
            control set fit the control set: held-out drift was 3.6 times its.
        held_out: prompts that are measured, and decide nothing: the ratio of
            their movement and drift to the control set's tells how far the
            budgets carry to other prompts (`StepRecord.generalisation`).
        every: steps from one held-out measurement to the next, 10 by default;
            each costs two forwards over these prompts, in every process.

    Raises:
        TypeError: ``model`` is no module; ``control``, ``pool`` or ``held_out`` is no ControlSet; ``audit_dtype`` is
            no floating-point dtype; spans or ``recompute`` that are none.
        ValueError: a pool or held-out set that shares a prompt with the
            control set, or with the other; model and control set on different
            devices; token ids outside the vocabulary, or texts that are too
            long; fewer micro-batches than processes; ``every`` without
            ``held_out``; ``recompute`` without layers; a model that is no causal language
            model, that does not return logits of all tokens, or whose forward
            leaves a trace that cannot be undone (see `module_state`); unmoved
            weights that do not read 0 (dropout in eval mode, say).

    >>> model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))  # input_ids -> logits
    >>> control = ControlSet.from_ids([[1, 2], [3]], [[4, 5], [6]], slices={"math": [0], "story": [1]})
    >>> kl = TokenKL(model, control)
    >>> kl.anchor(); kl().mean
    0.0
    """

    takes_any_weights = True
    has_tokens = True

    def __init__(
        self,
        model: nn.Module,
        control: ControlSet,
        *,
        micro_batch: int | None = None,
        prefix: bool | None = None,
        audit_dtype: torch.dtype | None = None,
        noise_floor: bool = True,
        check_parameters: bool = True,
        recompute: bool | None = None,
        shard: Any = False,
        spans: Mapping[str, tuple[int | None, int | None]] | None = None,
        pool: ControlSet | None = None,
        held_out: ControlSet | None = None,
        every: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(control, ControlSet):
            raise TypeError(f"control={control!r:.60} is no ControlSet; build one with ControlSet.from_texts/from_ids")
        check_model(model)
        micro_batch = micro_batch_of(control, micro_batch)
        check_device(model, control)
        check_audit_dtype(model, audit_dtype)
        control = as_read_by(model, control)
        self._check_parameters = check_parameters
        self._live_head: Head | None = None
        part = Shard.of(control, micro_batch, shard)
        self.model, self.control = model, part.control
        self.sharded, self._idle_forwards = part.sharded, part.idle if has_fsdp(model) else 0
        self.prompts, self.members = len(self.control), part.members
        self._digest = self.control.digest
        self._prompt_of_row = self.control.prompt_of_row
        self._positions = checked_spans(spans, list(control.slices), control.response_lengths)
        self.spans = self._spans_of(self.control)
        self.fallbacks: tuple[str, ...] = ()
        """Which of the short ways this model does not allow, and why."""
        self._micro_batch, self._shared = micro_batch, prefix_of(control, prefix)
        self._reading = Reading(model, audit_dtype, self._state, recompute)
        self._layout = Layout.of(self.control, micro_batch)
        self._measured(self._first_forward)
        own = {id(module) for module in model.modules()}
        self._watch = any(id(module) not in own for module in self.used)
        self._find_ways()
        if noise_floor:
            self.noise_floor = self._measured(self._measure_noise)
        self.every = checked_every(every, held_out=held_out is not None)
        if pool is not None:
            self.pool = self._on(checked_apart("pool", pool, control, self._vocabulary))
        if held_out is not None:
            self.held_out = self._on(checked_apart("held_out", held_out, control, self._vocabulary, pool))

    def _on(self, prompts: ControlSet) -> TokenKL:
        """Read the same model in the same way on other prompts."""
        check_names(self._positions, list(prompts.slices))
        other, prompts = copy.copy(self), as_read_by(self.model, prompts)
        other.control, other.prompts, other.members = prompts, len(prompts), dict(prompts.slices)
        other._prompt_of_row, other._digest = prompts.prompt_of_row, prompts.digest
        other.spans = {name: span for name, span in self._spans_of(prompts).items() if span.prompts}
        other._reference = other._origin = other.pool = other.held_out = None
        other.sharded, other._idle_forwards, other._scratch = False, 0, Scratch()
        other._shared, other._layout = 0, Layout.of(prompts, self._at_once)
        longest = other._layout.batches[: None if isinstance(prompts, ControlBatches) else 1]
        other._measured(lambda: [read_checked(self._reading, prompts, batch) for batch in longest])
        return other

    def _spans_of(self, control: ControlSet) -> dict[str, Span]:
        return find_spans(self._positions, control.response_lengths, control.device)

    def _normals(self, *args: Any) -> list[Normal]:
        with self._reading.recomputed():
            return super()._normals(*args)

    def _drawn(self, draw: Draw | None) -> Iterator[tuple[Tensor, Tensor]]:
        fewer = self._reading.recomputing
        if draw is None and not fewer:
            yield from self._batches()
            return
        prompts = range(self.prompts) if draw is None else draw.prompts  # without a prefix, whose cache layers write to
        at_once = max(1, self._at_once // FEWER_AT_ONCE) if fewer else self._at_once
        for layout, own in layouts_of(self.control, prompts, list(self.members.values()), at_once):
            for rows, x in self._batches(layout=layout):
                yield own[rows], x

    @property
    def reduces_gradients(self) -> bool:  # type: ignore[override]
        """Whether FSDP2 shards the model, and every process measures the same prompts."""
        return self._reading.sharded and not self.sharded

    @property
    def replica(self) -> Hashable:
        """The control set, which is whole; None if each process measures a part."""
        return None if self.sharded else self._digest

    @property
    def readout(self) -> str:
        """How rows are read: "hidden" (plain linear head), "rows" (the model's own head on response rows) or "full"."""
        return self._reading.readout

    @property
    def prefix_tokens(self) -> int:
        """How many tokens of every prompt are run once for all."""
        return self._layout.prefix.shape[1]

    def _first_forward(self) -> None:
        """Refuse a model that is no causal language model, or that cannot read the control set."""
        batch = self._layout.batches[-1]  # the shortest prompts
        with self._reading.cast():
            truth = read_checked(self._reading, self.control, batch)
        self._reading.check_recomputed(batch, self._moving)
        check_logits(truth)
        self._vocabulary = truth.shape[-1]
        if vocab_size_of(self.model) is None and not isinstance(self.control, ControlBatches):
            self.control.check_vocabulary(self._vocabulary)
        self.control.check_responses(self._vocabulary)

    def _find_ways(self) -> None:
        """Find the shortest way to read the model that agrees with its own logits, wherever training may lead it."""
        self._modules = self._structure()
        moved = {} if self._reading.sharded else noise.moved_away(self._moving)
        self._state.examine()  # what forwards write is perhaps nothing while an adapter is 0
        ways = self._measured(lambda: self._ways(moved))
        self._layout, self._at_once, self.fallbacks = ways.layout, ways.at_once, ways.fallbacks
        for why in ways.fallbacks:
            LOGGER.info("TokenKL(%s): %s", type(self.model).__name__, why)

    def _ways(self, moved: Mapping[int, Tensor]) -> Ways:
        with self._reading.cast(moved):
            alone = not (self.sharded and self._reading.sharded)  # all processes make as many forwards
            if isinstance(self.control, ControlBatches):
                return find_given_ways(self._reading, self.control, alone=alone)
            return find_ways(self._reading, self.control, self._micro_batch, self._shared, alone=alone)

    @property
    def _moving(self) -> list[Tensor]:
        """What training will move, but for weights that forwards write: a stand-in would be written over and over."""
        return noise.trained_weights(p for p in self.model.parameters() if not self._state.writes(p))

    def _structure(self) -> list[int]:
        """What the comparison of ways holds for: modules, and what is trained."""
        return [
            *map(id, self.model.modules()),
            *(id(p) for p in self.model.parameters() if p.requires_grad),
        ]

    def anchor(self, audit: Audit | None = None) -> None:
        """Take an audited policy, or the current weights, as reference; the first one is pi_ref too."""
        if audit is None and self._structure() != self._modules:  # adapters were added, say, or the head is trained now
            self._find_ways()
        super().anchor(audit)
        for part in self._parts:
            part._detach_origin()

    def _measure_noise(self) -> noise.NoiseFloor | None:
        here = self._policy()
        (still,) = self._movements(self._policy(), here)
        if still.mean != 0:
            raise ValueError(
                f"unmoved weights read K = {still.mean:.3g} nats per token instead of 0 (worst {still.worst}): the "
                "model's forward draws random numbers in eval mode (dropout?), keeps a state, or is not deterministic "
                "(torch.use_deterministic_algorithms). Repair it, or accept that much noise with noise_floor=False"
            )
        weights = [] if self._reading.sharded else self._moving
        if not weights:
            return None

        def moved(now: Rows, before: Rows) -> Movement:
            return self._movements(now, before)[0]

        ladder = noise.read_ladder(weights, self._policy, moved, here, self._reading.dtype)
        if ladder.is_still:
            noise.warn_of_still(len(weights), type(self.model).__name__, stacklevel=5)
        return ladder.floor(self._computed_in(here))

    def _computed_in(self, policy: Rows) -> torch.dtype:
        """The narrowest dtype of an audit, as far as weights and rows tell."""
        own = [p.dtype for p in self.model.parameters() if p.is_floating_point()]
        return noise.narrowest([policy.x.dtype, *([self._reading.dtype] if self._reading.dtype else own)])

    @property
    def noise_remedy(self) -> str:
        """An audit in float32, if this one is in narrower numbers by its own choice or the model's."""
        chosen = self._reading.dtype
        narrow = self.noise_floor is not None and noise.is_narrow(self.noise_floor.dtype)
        helps = narrow and (chosen is None or noise.is_narrow(chosen)) and not self._reading.sharded
        return "audit in float32: TokenKL(..., audit_dtype=torch.float32)" if helps else ""

    def describe(self) -> dict[str, Any]:
        """How the model is read, what it does not allow, and the noise floor."""
        return {
            "readout": self.readout,
            "prefix_tokens": self.prefix_tokens,
            "micro_batches": len(self._layout.batches),
            "fallbacks": list(self.fallbacks),
            "noise_floor": None if self.noise_floor is None else self.noise_floor.to_dict(),
        }

    def modules(self) -> Iterable[nn.Module]:
        """Return the model."""
        return (self.model,)

    def check_parameters(self, parameters: Sequence[Tensor]) -> None:
        """Refuse parameters that the model does not have: their movement could not be seen."""
        for module in self.model.modules():
            reshard(module)  # FSDP2 has other parameter objects while a module is unsharded
        if self._check_parameters:
            check_known(self.model, parameters)

    def _policy(self, replaced: Mapping[int, Tensor] | None = None) -> Rows:
        if self.readout == "hidden" and any(id(part) in (replaced or {}) for part in self._reading.head()):
            return self._gather(self._batches(replaced, "rows"), None)  # the kept head is not the one that stands in
        return self._gather(self._batches(replaced), self._head(live=False))

    def _batches(
        self, replaced: Mapping[int, Tensor] | None = None, readout: str | None = None, layout: Layout | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        reading, layout = self._reading, layout or self._layout
        with reading.cast(replaced):
            past = None
            for batch in layout.batches:
                if past is None or torch.is_grad_enabled():  # a graph serves one batch
                    past = reading.past(layout.prefix)
                yield batch.rows, reading.rows(batch, past, readout=readout)
            for _ in range(self._idle_forwards):  # FSDP2 gathers weights in every forward: all make as many
                reading.rows(layout.batches[-1], readout=readout)

    def _detach_origin(self) -> None:
        """Give pi_ref a head of its own before training moves the model's."""
        if self._origin is None or self._origin.head is None:
            return
        weight, bias = self._reading.head()
        if self._origin.head.weight is weight and any(p.requires_grad for p in (weight, bias) if p is not None):
            self._origin = Rows(self._origin.x, self._origin.head.copy())

    def _head(self, *, live: bool) -> Head | None:
        """The live head if it is frozen, the same object every time; a copy if training will move it."""
        if self.readout != "hidden":
            return None
        weight, bias = self._reading.head()
        if self._live_head is None or self._live_head.weight is not weight:
            self._live_head = Head(weight, bias)
        if live or not any(p.requires_grad for p in (weight, bias) if p is not None):
            return self._live_head
        self._detach_origin()  # it was frozen until now
        return self._live_head.copy()

    def state_dict(self) -> dict[str, Any]:
        """pi_ref, so that drift goes on being measured from the start of training.

        Hidden states [R, D], with a copy of the head [V, D] if training moves it; or logits [R, V].
        """
        if self._origin is None:
            return {}
        origin = state_of_rows(self._origin, self._live_head)
        return {"control": self.control.digest} | origin | self._more_state()

    def _read_origin(self, state: Mapping[str, Any]) -> Rows:
        if state["control"] != self.control.digest:
            raise ValueError(
                "the checkpoint's pi_ref was measured on another control set; resume with the one of the run that "
                "saved it (control.save, ControlSet.load)"
                + (", and every process with the checkpoint that it saved itself" if self.sharded else "")
            )
        return rows_from_state(state, self._head(live=True), self._prompt_of_row, self._vocabulary)

    def take_origin_from(self, other: KLClosure) -> bool:
        """Take over pi_ref of another `TokenKL` of this model, whose sets have all prompts of this one's."""
        if not isinstance(other, TokenKL) or plain(other.model) is not plain(self.model):
            return False
        return other.readout == self.readout and take_origins(self._parts, other._parts)

    @property
    def _parts(self) -> list[TokenKL]:
        """This closure and those on other prompts that belong to it."""
        return [self, *(other for other in self._others.values() if isinstance(other, TokenKL))]

    def __repr__(self) -> str:
        return (
            f"TokenKL({type(self.model).__name__}, {len(self.control)} prompts, {self.control.response_tokens} "
            f"response tokens, slices={list(self.slices)}, readout={self.readout!r}, "
            f"prefix_tokens={self.prefix_tokens})"
        )
