"""TokenKL: movement of a causal language model on a control set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from step_optim.control import ControlSet
from step_optim.isolation import has_fsdp, isolated, reshard
from step_optim.language_models import accepted_arguments, check_device, output_head, plain, vocab_size_of
from step_optim.logit_kl import LogitKL
from step_optim.rows import Head, Rows
from step_optim.shard import Shard, batch_members
from step_optim.undo import inserted

HEAD_TOLERANCE = 1e-3
"""Largest relative difference between a model's logits and a plain linear head's at which they count as one."""

LARGE_LOGIT = 1e3
"""Size to which logits are blown up for that comparison: soft-capping is invisible on small ones."""


@dataclass(frozen=True)
class Batch:
    """Some prompts of the control set, padded on the right to one length."""

    ids: Tensor
    """[B, T] token ids; the padding is never looked at."""

    mask: Tensor
    """[B, T] 1 where there is a token."""

    positions: Tensor
    """[r] places in the flattened [B T] whose logits predict a response token."""

    rows: Tensor
    """[r] which response rows of the control set those are."""


class TokenKL(LogitKL):
    """KL per response token of a causal language model, over the full vocabulary (the paper's section 3.2).

    It owns its reference: the audit that licensed a commit becomes the
    reference of the next step, so that a committed step costs one forward over
    the control set. The head runs on response positions only. With a plain
    linear head only hidden states are kept ([R, D]), and the vocabulary is
    streamed in blocks; with any other head the response rows' logits are kept
    ([R, V]). `readout` says which.

    Args:
        model: a causal language model: ``model(input_ids)`` returns logits
            [B, T, V] or an object with ``.logits``. PEFT, DDP and compiled
            models are fine.
        control: the control set, on the model's device.
        micro_batch: prompts evaluated at once. The layout is frozen at
            construction: the same batches in the same order make zero movement
            read exactly 0.
        check_parameters: refuse an optimizer with parameters that the model
            does not have. False for a value head that the policy does not read.
        shard: under torch.distributed, let every process evaluate a part of
            the control set: True for all processes, or a ProcessGroup. Every
            process is given the whole set; the KLs are put together before
            anything is decided.

    Raises:
        TypeError: ``control`` is no ControlSet.
        ValueError: model and control set on different devices; token ids
            outside the vocabulary; fewer micro-batches than processes.
    """

    def __init__(
        self,
        model: nn.Module,
        control: ControlSet,
        *,
        micro_batch: int = 4,
        check_parameters: bool = True,
        shard: Any = False,
    ) -> None:
        super().__init__()
        if not isinstance(control, ControlSet):
            raise TypeError(f"control={control!r:.60} is no ControlSet; build one with ControlSet.from_texts/from_ids")
        if micro_batch < 1:
            raise ValueError(f"micro_batch={micro_batch} must be at least 1 prompt")
        check_device(model, control)
        vocab_size = vocab_size_of(model)
        if vocab_size is not None:
            control.check_vocabulary(vocab_size)
        self._refuse_strangers = check_parameters
        self._live_head: Head | None = None
        part = Shard.of(control, micro_batch, shard)
        self.model, self.control = model, part.control
        self.sharded, self._spare_forwards = part.sharded, part.spare if has_fsdp(model) else 0
        self.prompts, self.members = len(self.control), part.members
        lengths = torch.tensor([len(response) for response in self.control.responses])
        self._prompt_of_row = torch.repeat_interleave(torch.arange(self.prompts), lengths).to(control.device)
        self._batch_list = list(_layout(self.control, micro_batch))
        self._arguments = accepted_arguments(model)
        self.readout = self._find_readout()
        """"hidden" (plain linear head), "rows" (the model's own head on response rows) or "full"."""

    def modules(self) -> Iterable[nn.Module]:
        """Return the model."""
        return (self.model,)

    def check_parameters(self, parameters: Sequence[Tensor]) -> None:
        """Refuse parameters that the model does not have: their movement could not be seen."""
        for module in self.model.modules():
            reshard(module)  # FSDP2 has other parameter objects while a module is unsharded
        known = {id(p) for p in self.model.parameters()}
        strangers = [tuple(p.shape) for p in parameters if id(p) not in known]
        if strangers and self._refuse_strangers:
            raise ValueError(
                f"{len(strangers)} of the optimizer's {len(parameters)} parameters are not parameters of the model in "
                f"TokenKL (shapes {strangers[:3]}{'...' if len(strangers) > 3 else ''}); pass the model that they "
                "belong to, or TokenKL(..., check_parameters=False) if the policy does not read them (a value head)"
            )

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._batch_list:
            yield batch.rows, self._read(batch, self.readout)
        for _ in range(self._spare_forwards):  # FSDP2 gathers weights in every forward: all processes make as many
            self._read(self._batch_list[-1], self.readout)

    def _head(self, *, live: bool) -> Head | None:
        """The live head if it is frozen, the same object every time; a copy if training will move it."""
        if self.readout != "hidden":
            return None
        module = output_head(self.model)
        if self._live_head is None or self._live_head.weight is not module.weight:
            self._live_head = Head(module.weight, module.bias)
        if live or not any(p.requires_grad for p in module.parameters()):
            return self._live_head
        if self._origin is not None and self._origin.head is self._live_head:  # it was frozen until now
            self._origin = Rows(self._origin.x, self._live_head.copy())
        return self._live_head.copy()

    def _read(self, batch: Batch, readout: str, probe: Tensor | None = None) -> Tensor:
        """[r, D] hidden states or [r, V] logits of one batch's response rows.

        With ``probe``: what the model makes of these hidden states in the place of its own.
        """
        if readout == "full":
            return rearrange(self._forward(batch), "b t v -> (b t) v")[batch.positions]
        with _head_on_rows(output_head(self.model), batch, hidden_only=readout == "hidden", probe=probe) as tap:
            logits = self._forward(batch)
        return tap.hidden if readout == "hidden" else logits[0]

    def _forward(self, batch: Batch) -> Tensor:
        extra = {"attention_mask": batch.mask, "use_cache": False}
        out = plain(self.model)(batch.ids, **{name: extra[name] for name in self._arguments})
        logits: Tensor = out if isinstance(out, Tensor) else out.logits
        return logits

    def _find_readout(self) -> str:
        """Compare the short ways with the model's own logits on one batch, and take the shortest that agrees."""
        head, batch = output_head(self.model), self._batch_list[-1]  # the shortest prompts
        with isolated([self.model]):
            truth = self._read_checked(batch)
            self._vocabulary = truth.shape[-1]
            if vocab_size_of(self.model) is None:
                self.control.check_vocabulary(truth.shape[-1])
            if head is None or not _agree(self._try_rows(batch), truth):
                return "full"
            for module in self.model.modules():
                reshard(module)
            if type(head) is not nn.Linear or hasattr(head.weight, "placements"):
                return "rows"  # under FSDP2 the whole head is there in a forward only
            if head.weight.shape[0] != truth.shape[-1]:
                return "rows"
            plain = Head(head.weight.float(), None if head.bias is None else head.bias.float())
            # Soft-capping and scaling show themselves on large logits only.
            probe = torch.randn_like(self._read(batch, "hidden"))
            probe *= LARGE_LOGIT / max(float(plain(probe.float()).abs().max()), 1e-6)
            large = self._read(batch, "rows", probe=probe)
            same = _agree(plain(self._read(batch, "hidden").float()), truth) and _agree(plain(probe.float()), large)
            return "hidden" if same else "rows"

    def _read_checked(self, batch: Batch) -> Tensor:
        try:
            return self._read(batch, "full")
        except IndexError as error:  # a model that does not tell the size of its vocabulary
            raise ValueError(self._unreadable()) from error

    def _unreadable(self) -> str:
        for i, (prompt, response) in enumerate(zip(self.control.prompts, self.control.responses, strict=True)):
            try:
                self.model(torch.cat([prompt, response])[None])
            except IndexError:
                return f"prompt {i} of the control set has a token id outside the vocabulary of the model"
        return "the model cannot read the control set"

    def _try_rows(self, batch: Batch) -> Tensor | None:
        try:
            return self._read(batch, "rows")
        except (RuntimeError, ValueError, IndexError, TypeError):
            return None  # a model that does more with its head's output than pass it on

    def state_dict(self) -> dict[str, Any]:
        """pi_ref, so that drift goes on being measured from the start of training.

        Hidden states [R, D], with a copy of the head [V, D] if training moves it; or logits [R, V].
        """
        if self._origin is None:
            return {}
        state = {"control": self.control.digest, "x": self._origin.x}
        head = self._origin.head
        if head is None or head is self._live_head:
            return state
        return state | {"weight": head.weight, "bias": head.bias}

    def _read_origin(self, state: Mapping[str, Any]) -> Rows:
        if state["control"] != self.control.digest:
            raise ValueError(
                "the checkpoint's pi_ref was measured on another control set; resume with the one of the run that "
                "saved it (control.save, ControlSet.load)"
                + (", and every process with the checkpoint that it saved itself" if self.sharded else "")
            )
        head = self._head(live=True)
        x = state["x"].to(self.control.device)
        shape = self.control.response_tokens, self._vocabulary if head is None else head.weight.shape[1]
        if head is not None and not state.keys().isdisjoint(("weight", "bias")):
            saved = Head(state["weight"].to(x.device), None if state["bias"] is None else state["bias"].to(x.device))
            if _shapes(saved) != _shapes(head):
                raise ValueError(f"the checkpoint's pi_ref has a head of shapes {_shapes(saved)}, not {_shapes(head)}")
            head = saved
        if x.shape != shape:
            raise ValueError(
                f"the checkpoint's pi_ref has the shape {tuple(x.shape)}, not {shape}, [response token, D]"
            )
        return Rows(x, head)

    def __repr__(self) -> str:
        return (
            f"TokenKL({type(self.model).__name__}, {len(self.control)} prompts, {self.control.response_tokens} "
            f"response tokens, slices={list(self.members)}, readout={self.readout!r})"
        )


def _shapes(head: Head) -> list[tuple[int, ...]]:
    return [tuple(part.shape) for part in (head.weight, head.bias) if part is not None]


class _Tap:
    """What the head was given."""

    hidden: Tensor


@contextmanager
def _head_on_rows(head: nn.Module, batch: Batch, *, hidden_only: bool, probe: Tensor | None) -> Iterator[_Tap]:
    """Let the model's head see the response rows only: [B, T, D] becomes [1, r, D].

    The model's own code then applies whatever it applies to its logits.
    ``hidden_only`` leaves it a single row to chew on.
    """
    tap = _Tap()

    def select(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = rearrange(inputs[0], "b t d -> (b t) d")[batch.positions]
        tap.hidden = hidden if probe is None else probe.to(hidden.dtype)
        return (tap.hidden[None, : 1 if hidden_only else None], *inputs[1:])

    with inserted(select, head._forward_pre_hooks):
        yield tap


def _layout(control: ControlSet, micro_batch: int) -> Iterator[Batch]:
    """Pad the prompts of every micro-batch, and freeze the result."""
    first_row = [0]
    for response in control.responses:
        first_row.append(first_row[-1] + len(response))
    for members in batch_members(control, micro_batch):
        width = max(len(control.prompts[i]) + len(control.responses[i]) for i in members)
        ids = torch.zeros(len(members), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        positions: list[int] = []
        rows: list[int] = []
        for place, i in enumerate(members):
            text = torch.cat([control.prompts[i], control.responses[i]]).cpu()
            ids[place, : len(text)], mask[place, : len(text)] = text, 1
            # The logits at position t predict token t + 1.
            positions += range(place * width + len(control.prompts[i]) - 1, place * width + len(text) - 1)
            rows += range(first_row[i], first_row[i + 1])
        yield Batch(*(part.to(control.device) for part in (ids, mask, torch.tensor(positions), torch.tensor(rows))))


def _agree(logits: Tensor | None, truth: Tensor) -> bool:
    if logits is None or logits.shape != truth.shape:
        return False
    rounding = max(torch.finfo(logits.dtype).eps, torch.finfo(truth.dtype).eps)
    tolerance = max(HEAD_TOLERANCE, 4 * rounding) * float(truth.float().abs().max())
    return float((logits.float() - truth.float()).abs().max()) <= tolerance
