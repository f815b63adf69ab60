"""A run as one stage of several: what it takes over from its ledger, and what it writes there."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from step_optim.audit.closure import KLClosure
from step_optim.budget import Budget
from step_optim.controllers.base import Action
from step_optim.host.files import write_whole
from step_optim.host.ranks import Ranks
from step_optim.path_length import PathLength
from step_optim.telemetry.ledger import Ledger
from step_optim.telemetry.ledger_file import Stage, policy_file, read_ledger
from step_optim.telemetry.record import StepRecord


class Stages:
    """What ties a run to its ledger.

    Args:
        ledger: of this stage; one optimizer writes it.
        ranks: the first of them writes.

    Raises:
        TypeError: no `Ledger`.
        ValueError: one without a stage.
    """

    def __init__(self, ledger: Ledger, ranks: Ranks) -> None:
        if not isinstance(ledger, Ledger):
            raise TypeError(f"ledger={ledger!r:.60} is no Ledger; give Ledger('runs/ledger.json', stage='sft'), say")
        if ledger.stage is None:
            raise ValueError(f"ledger={ledger!r} names no stage to write; give it one, Ledger(path, stage='sft')")
        self.ledger, self.name, self._ranks = ledger, ledger.stage, ranks
        self._begun = False
        """Whether a step of this process has begun."""
        self._since: str | None = None
        """When the stage began; None before the first step of this process that counts."""
        self.resumed = False
        """Whether a checkpoint of this stage was loaded."""
        self._own = ledger.origin == "own"
        """Whether displacement is from the stage's own start, or what it was told."""
        self._read_as: tuple[int, int] | None = None
        """As which process of how many pi_ref was read here."""
        found = ledger.found
        self._displaced = None if found is None else (found.displacement, found.displacement_slices)

    @property
    def before(self) -> PathLength:
        """Path length of the stages before."""
        return self.ledger.before

    def begin(self) -> None:
        """Look, before the first step, whether all is still as it was when the run was made.

        Raises:
            RuntimeError: it is not.
            ValueError: a file that is damaged, or a pi_ref of another ledger.
        """
        if self._begun:
            return
        try:
            self._begin()
        except (OSError, ValueError) as error:  # this process may be the only one that reads what is wrong
            self._ranks.announce_failure(error, fatal=True)
            raise
        self._begun = True

    def _begin(self) -> None:
        ledger, ranks = self.ledger, self._ranks
        now = read_ledger(ledger.path)[1] if ranks.first else ()
        views = ranks.exchange((ledger.is_first, ledger.id, ledger.stages, now))
        if any(is_first != views[0][0] for is_first, *_ in views):
            raise RuntimeError(f"not all processes can read {ledger.path}; put it where all of them see it")
        ledger.begin(self, *views[0][1:])
        if self._read_as not in (None, (self._ranks.rank, self._ranks.size)):
            raise RuntimeError(
                "torch.distributed began after the KL closure was bound: this process has the pi_ref of another one. "
                "Initialise it before the optimizer is made, or bind the KL closure afterwards"
            )
        self._check_left_behind()

    # -- pi_ref -------------------------------------------------------------------------------------------------------

    def _file(self, kl: KLClosure) -> Path:
        """Where pi_ref is: processes with prompts of their own have a file each."""
        return policy_file(self.ledger.path, None if kl.replica is not None else self._ranks.rank)

    def pi_ref(self, kl: KLClosure) -> Mapping[str, Any]:
        """Return what the first stage has saved, for a KL closure to load; nothing if this is the first step of it.

        Raises:
            ValueError: it does not fit, or is missing.
        """
        if self.ledger.origin == "own" or not kl.measures_drift:
            return {}
        file = self._file(kl)
        remedies = (
            "bind it with the prompts of the first stage (control.save, ControlSet.load; pool and held-out set, too); "
            "or say what this stage measures from, bind(kl, origin='adapter_off') or 'now'; or measure each stage "
            f"from its own start, {type(self.ledger).__name__}(..., origin='own')"
        )
        if not file.exists():
            if self.ledger.is_first:
                return {}
            raise ValueError(f"{file} is missing: the stages before have saved no pi_ref that {kl!r} needs; {remedies}")
        saved = self._read_own(file)
        size = self._ranks.size if kl.replica is None else 1
        try:
            if saved["processes"] != size:
                raise ValueError(f"it was saved by {saved['processes']} processes, and there are {size}")
            kl.check_state_dict(saved["kl"])
        except ValueError as error:
            raise ValueError(f"the ledger's pi_ref, {file}, does not fit {kl!r}: {error}; {remedies}") from error
        self._read_as = (self._ranks.rank, self._ranks.size) if kl.replica is None else None
        state: Mapping[str, Any] = saved["kl"]
        return state

    def _read_own(self, file: Path) -> dict[str, Any]:
        """Read pi_ref, and refuse that of another ledger."""
        saved = _read_policy(file)
        if saved["ledger"] != self.ledger.id:
            raise ValueError(
                f"{file} is the pi_ref of another ledger than {self.ledger.path}: that one was deleted or replaced, or "
                "the file was copied. Delete it or move it away, or put its ledger back"
            )
        return saved

    def _check_left_behind(self) -> None:
        """Refuse to begin beside a pi_ref that is not this ledger's: no KL closure asks for one after a checkpoint."""
        file = policy_file(self.ledger.path, self._ranks.rank)
        if self.ledger.is_first and not self._own and file.exists():
            self._read_own(file)

    def measured_from(self, origin: str | None) -> None:
        """Take note of what ``bind(origin=)`` said."""
        if origin != "keep":
            self._own = self.ledger.origin == "own" or origin is not None

    def measured_as_before(self) -> None:
        """Take note that pi_ref is the one of this stage's checkpoint."""
        found = self.ledger.found
        self._own = self.ledger.origin == "own" or (found is not None and found.origin == "own")

    def _save(self, kl: KLClosure) -> None:
        """Save pi_ref of the first stage, once."""
        file = self._file(kl)
        mine = kl.replica is None or self._ranks.first
        if self._own or not mine or not self.ledger.is_first or not kl.has_origin or file.exists():
            return
        size, data = self._ranks.size if kl.replica is None else 1, io.BytesIO()
        torch.save({"ledger": self.ledger.id, "processes": size, "kl": kl.origin_state()}, data)
        write_whole(file, data.getbuffer())

    # -- figures ------------------------------------------------------------------------------------------------------

    def keep(self, record: StepRecord, steps: int, path: PathLength, kl: KLClosure | None, budget: Budget) -> None:
        """Write what this stage has done, with the step that was decided last.

        A step that moved nothing is left out: checkpointing makes some before a checkpoint is loaded.

        Args:
            record: of this step.
            steps: of this stage, with this one.
            path: of this stage, with this step.
            kl: what measured it, if it is the bound one.
            budget: of the steps to come.
        """
        if record.action is Action.UNCHANGED:
            return
        drift = record.reference_drift
        if drift is not None:
            self._displaced = self._displaced if kl is None else (drift.mean, dict(drift.slices))
        elif kl is not None and not kl.measures_drift:  # where it does, the step failed and moved nothing
            self._displaced = None
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        if self._since is None:
            self._since = self._first_step(now)
        stage = Stage(
            self.name,
            steps,
            path.mean,
            path.slices,
            *(self._displaced or (None, {})),
            origin="own" if self._own else "first",
            began=self._since,
            ended=now,
            budget=repr(budget),
        )
        (self.ledger.write if self._ranks.first else self.ledger.enter)(stage)
        if kl is not None:
            self._save(kl)

    def _first_step(self, now: str) -> str:
        """Look at the entry that this process begins with; return when the stage began."""
        found = self.ledger.found
        if found is None or found.steps == 0:
            return now
        if not self.resumed and self._ranks.first:
            _warn_of_restart(found)
        return found.began if self.resumed else now


def _read_policy(file: Path) -> dict[str, Any]:
    """Read what `Stages` has saved.

    Raises:
        ValueError: the file is damaged, or something else.
    """
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(saved, dict) or not saved.keys() >= {"ledger", "processes", "kl"}:
            raise ValueError("it has other entries")
    except OSError:
        raise
    except Exception as error:  # a file can be damaged in as many ways as torch has errors
        first = str(error).partition("\n")[0]
        raise ValueError(
            f"{file}, a ledger's pi_ref, is damaged or another file ({type(error).__name__}: {first:.120}). Put it "
            "back; or measure each stage from its own start, Ledger(..., origin='own')"
        ) from error
    return saved


def _warn_of_restart(found: Stage) -> None:
    warnings.warn(
        f"the ledger has {found.steps} steps of stage {found.stage!r}, path length {found.path:.3g}, and this run "
        "begins at step 0 without the checkpoint of its optimizer. It is taken for a new start from the stage's first "
        "weights: those steps count no longer. If the weights go on from them, their path length is lost: load the "
        f"optimizer's state_dict before the first step, or give the ledger a new stage, {found.stage + '-2'!r} say",
        stacklevel=2,
    )
