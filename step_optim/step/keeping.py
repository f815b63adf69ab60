"""Partial commits: in one step in progress, what the KL closure does not read is told, spared, and checked."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from torch.optim import Optimizer

from step_optim.host.ranks import Ranks
from step_optim.snapshot.snapshot import Snapshot
from step_optim.step.auditor import Auditor
from step_optim.step.progress import Run
from step_optim.step.unread import Probe, Unread, can_be_moved, refuse_read, warn_of_none


class Keeping:
    """Lets what the policy does not read keep its whole step.

    Args:
        run: knows what is asked for, and what was found.
        optimizer: the inner optimizer.
        snapshot: has both ends of the step.
        auditor: measures.
        ranks: who has to agree.
    """

    def __init__(self, run: Run, optimizer: Optimizer, snapshot: Snapshot, auditor: Auditor, ranks: Ranks) -> None:
        self._run, self._optimizer, self._snapshot = run, optimizer, snapshot
        self._auditor, self._ranks = auditor, ranks
        self._probe = Probe(auditor, snapshot, ranks)

    @property
    def probes(self) -> int:
        """Audits and gradients that told what is read, in this step."""
        return self._probe.count

    @property
    def count(self) -> int:
        """How many tensors keep their whole step, though the step was not committed as a whole."""
        return len(self._snapshot.spared)

    def groups(self) -> set[int]:
        """Ids of the parameter groups that keep their whole step, as far as that is known: no rate of theirs adapts."""
        unread = self._run.unread
        kept = set() if unread is None else {id(p) for p in self._parameters(unread.found or ())}
        groups = self._optimizer.param_groups if kept else ()
        return {id(group) for group in groups if group["params"] and all(id(p) in kept for p in group["params"])}

    # -- before the decision ------------------------------------------------------------------------------------------

    def measure(self) -> None:
        """Find out what the KL closure reads, unless that is known. The candidate is in place, before and afterwards.

        Raises:
            CannotKeep: a parameter that was named is read, or its state is not its own.
        """
        unread, kl = self._run.unread, self._auditor.kl
        if unread is None or unread.is_known(kl):
            return
        snapshot = self._snapshot
        snapshot.keep_candidate()
        places = snapshot.places()
        able = {i for i, previous in enumerate(snapshot.previous) if can_be_moved(previous)}
        asked = able if unread.asked is None else {i for p in unread.asked for i in places[p]} & able
        free = set(self._probe.unread(sorted(asked)))
        snapshot.go(1)
        found = [i for i, parts in enumerate(places) if parts and free.issuperset(parts) and i not in unread.read]
        names = self._names()
        for position in unread.asked or ():
            if position not in unread.read and not free.issuperset(able.intersection(places[position])):
                raise refuse_read(names[position])
        if found:
            snapshot.check_apart(self._parameters(found))
        else:
            warn_of_none(kl)
        read = [i for i, parts in enumerate(places) if parts and not free.issuperset(parts)]
        self._run.unread = unread.measured(kl, found, [names[i] for i in found], read)

    def _parameters(self, positions: Sequence[int]) -> list[Tensor]:
        every = [p for group in self._optimizer.param_groups for p in group["params"]]
        return [every[i] for i in positions if i < len(every)]

    def _names(self) -> list[str]:
        """Of the optimizer's parameters: those of the modules that the KL closure knows, and else where they are."""
        known: dict[int, str] = {}
        for name, place in self._auditor.names().items():
            if place is not None:
                known.setdefault(place, name)
        own = [
            f"param_groups[{i}]['params'][{j}]"
            for i, group in enumerate(self._optimizer.param_groups)
            for j, _ in enumerate(group["params"])
        ]
        found = [next((known[i] for i in parts if i in known), None) for parts in self._snapshot.places()]
        return [name or place for name, place in zip(found, own, strict=True)]

    # -- the decision -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """The candidate is infeasible: from here on, spare what is unread, if its update is finite."""
        unread = self._run.unread
        if unread is None or not unread.found:
            return
        self._snapshot.keep_candidate()
        self._snapshot.spare(self._parameters(unread.found))
        if not all(self._ranks.exchange(self._snapshot.spared_is_finite)):
            self._snapshot.spare(())

    def moved(self) -> bool:
        """Whether the weights are others than theta_t, apart from what is spared."""
        own = self._snapshot.moved() if self._snapshot.spared else self._snapshot.update().read()[0]
        return any(self._ranks.exchange(own))

    def reject(self, *, keep_state: bool, rewind: bool) -> None:
        """Put theta_t back, but for what is spared; what is left must read what theta_t reads.

        What makes a difference there was unread where it was measured, and is read here (an expert that was never
        called, say). It is rolled back with the rest, and from now on it belongs to the policy.
        """
        if self._snapshot.spared:
            self._check()
        self._snapshot.reject(keep_state=keep_state, rewind=rewind)

    def _check(self) -> None:
        snapshot, unread = self._snapshot, self._run.unread
        assert unread is not None
        snapshot.go(0)
        if self._probe.reading().largest == 0:
            return
        spared, candidate = snapshot.spared, snapshot.candidate
        snapshot.spare(())
        still = self._probe.at(snapshot.previous)
        read = self._probe.read_of(spared, snapshot.previous, still, {i: candidate[i] for i in spared})
        places = snapshot.places()
        wrong = [i for i in unread.found or () if not set(read).isdisjoint(places[i])]
        if wrong:
            self._belong_to_the_policy(unread, wrong)
        snapshot.spare(self._parameters([i for i in unread.found or () if i not in wrong]))

    def _belong_to_the_policy(self, unread: Unread, wrong: Sequence[int]) -> None:
        names = self._names()
        kept = [i for i in unread.found or () if i not in wrong]
        self._run.unread = replace(
            unread, found=tuple(kept), names=tuple(names[i] for i in kept), read=(*unread.read, *wrong), warned=True
        )
        if not unread.warned:
            warnings.warn(
                f"keep=: the KL closure reads {names[wrong[0]]} now, and did not when that was measured (an expert "
                "that was never called?). It was rolled back with the rest, and belongs to the policy from now on",
                stacklevel=2,
            )
