"""The ledger: path length against displacement, over resumes and stages of training (SFT, then DPO, then GRPO)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import reduce
from pathlib import Path
from typing import Any
from uuid import uuid4

from step_optim.host.files import check_writable
from step_optim.host.paths import user_path
from step_optim.path_length import PathLength
from step_optim.telemetry.ledger_file import ORIGINS, Stage, policies, read_ledger, write_ledger
from step_optim.telemetry.summary import Summary


class Ledger:
    """What the stages of a training have done to the policy, in a JSON file that is written after every step.

    Path length is the sum of the committed movements; displacement is the
    movement of the policy from pi_ref, the policy at the start of the first
    stage. With a ledger, `Budget(path=...)` and `Budget(drift=...)` are caps
    on all stages together::

        STEPOptimizer(..., budget=Budget(path=0.5, drift=0.3), ledger=Ledger("runs/ledger.json", stage="dpo"))

    A resumed stage has the same name, and the optimizer's checkpoint is
    loaded: its entry is that of the checkpoint's steps and those after it. A
    stage that starts over, from its first weights, begins its entry anew.

    For displacement, the first stage saves pi_ref beside the file
    (``ledger.pi_ref.pt``: what a checkpoint has of it, and the head [V, D]),
    and later stages take it over; so they need the same control set, pool and
    held-out set. Under torch.distributed the first process writes.

    Args:
        path: the JSON file. Several stages share it, one after the other.
        stage: the name of this stage. Without one the ledger can only be read.
        origin: ``"first"``, as above; ``"own"``: each stage measures from its own
            pi_ref, on prompts of its own, and nothing is saved beside the file.

    Raises:
        TypeError: a stage that is no text.
        ValueError: another file than a ledger, or one that cannot be written; a stage that others came after; an
            unknown origin.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Ledger(f"{folder}/ledger.json", stage="sft").write(Stage("sft", steps=10, path=0.25, displacement=0.5))
    ...     print(Ledger(f"{folder}/ledger.json"))
    stage       steps  slice          path   so far  displacement  displacement / path
    sft            10  all            0.25     0.25           0.5                    2
    """

    def __init__(self, path: str | Path, stage: str | None = None, *, origin: str = "first") -> None:
        if stage is not None and (not isinstance(stage, str) or not stage):
            raise TypeError(f"stage={stage!r} is no name; give a text, such as 'sft'")
        if origin not in ORIGINS:
            raise ValueError(f"origin={origin!r} is unknown; use 'first' or 'own'")
        if not isinstance(path, (str, Path)) or not str(path) or user_path(path).is_dir():
            raise ValueError(f"path={path!r:.200} is no file; give one such as 'runs/ledger.json'")
        self.path, self.stage, self.origin = user_path(path).absolute(), stage, origin
        known, self.stages = read_ledger(self.path)
        """Those of the file, and this one as far as it is now."""
        self.id = known or uuid4().hex
        """Tells this ledger from others; it stands in its files."""
        names = [each.stage for each in self.stages]
        if stage in names[:-1]:
            raise ValueError(
                f"stage={stage!r} ended when {names[names.index(stage) + 1]!r} began ({self.path}). Give a new stage a "
                f"name of its own; or, to train on from there, Ledger(path).forget({names[names.index(stage) + 1]!r})"
            )
        if stage is not None:
            check_writable(self.path.parent, f"path={str(path)!r}")
        self._look()
        self._writer: object = None
        self._written: str | None = None
        """The file, as this ledger wrote it last."""

    def _look(self) -> None:
        """Tell this stage's entry from those before it."""
        mine = bool(self.stages) and self.stages[-1].stage == self.stage
        self.found = self.stages[-1] if mine else None
        """What the file has of this stage already."""
        self._earlier = self.stages[:-1] if mine else self.stages
        self.before = _length(self._earlier)
        """Path length of the stages before this one."""

    @property
    def is_first(self) -> bool:
        """Whether no stage came before this one."""
        return not self._earlier

    def begin(self, writer: object, name: str, known: tuple[Stage, ...], now: tuple[Stage, ...]) -> None:
        """Begin with what was read, unless another run has added to it since then.

        Args:
            writer: who enters the steps of this stage from now on; one alone may.
            name: the first process's `id`.
            known: what the first process read when its ledger was made. Another one may have been too early for the
                last step of the stage before.
            now: what it reads now.

        Raises:
            RuntimeError: these differ; or another writer.
        """
        if self._writer is not None and self._writer is not writer:
            raise RuntimeError(f"{self!r} belongs to another optimizer already; make a Ledger for each")
        if known and not now:
            raise RuntimeError(
                f"{self.path} has gone since Ledger(stage={self.stage!r}) was made, and with it the path length of the "
                "stages before; put it back, or make the ledger anew"
            )
        if now != known:
            raise RuntimeError(
                f"{self.path} was written by another run since Ledger(stage={self.stage!r}) was made: its path length "
                "would not be counted. Make the ledger and the optimizer of a stage once the stage before has ended"
            )
        self._writer, self.id, self.stages = writer, name, known
        self._look()

    def enter(self, stage: Stage) -> None:
        """Put what this stage has done into the place of its entry, in memory."""
        self.stages = (*self._earlier, stage)

    def write(self, stage: Stage) -> None:
        """Do that, and write the file: the whole of it, or nothing.

        Raises:
            RuntimeError: another run has written it since the latest step of this one.
        """
        self.enter(stage)
        if self._written is not None and self.path.exists() and self.path.read_text(encoding="utf-8") != self._written:
            raise RuntimeError(
                f"{self.path} was written by another run since the latest step of stage {self.stage!r}: two runs at "
                "once cannot share a ledger, and a stage ends when the next one begins. Give each run its own file"
            )
        self._written = write_ledger(self.path, self.id, self.stages)

    def end_at(self, checkpoint: Mapping[str, Any]) -> None:
        """Let the last stage end at a checkpoint of it: later steps, whose weights are not gone on with, do not count.

        Args:
            checkpoint: the optimizer's ``state_dict()`` of that time.

        Raises:
            ValueError: it is of another stage, or of no `STEPOptimizer` with a ledger.
        """
        own = checkpoint.get("step_optim", {})
        if not self.stages or own.get("stage") != self.stages[-1].stage:
            last = self.stages[-1].stage if self.stages else None
            raise ValueError(
                f"the checkpoint is of stage {own.get('stage')!r}, and the last one in {self.path} is {last!r}; give "
                "the state_dict() of that stage's STEPOptimizer"
            )
        summary = Summary(own["summary"])
        figures = summary.figures()
        self.stages = (
            *self.stages[:-1],
            replace(
                self.stages[-1],
                steps=summary.steps,
                path=summary.path.mean,
                path_slices=summary.path.slices,
                displacement=figures["reference_drift"],
                displacement_slices=figures["reference_drift_by_slice"],
            ),
        )
        self._look()
        self._written = write_ledger(self.path, self.id, self.stages)

    def forget(self, stage: str) -> None:
        """Drop a stage, and all after it, whose weights are not gone on with.

        Raises:
            ValueError: there is no such stage.
        """
        names = [each.stage for each in self.stages]
        if stage not in names:
            raise ValueError(f"stage={stage!r} is not in {self.path}; it has {names}")
        self.stages = self.stages[: names.index(stage)]
        if not self.stages:
            self.id = uuid4().hex  # a pi_ref that a kill leaves behind is a stranger's
        self._written = write_ledger(self.path, self.id, self.stages)
        if not self.stages:
            for policy in policies(self.path):
                policy.unlink()

    def figures(self) -> dict[str, Any]:
        """Return what the ledger has: the stages in order, and the totals; KL in nats per token.

        A ratio is displacement / path length so far. KL grows like the square
        of a movement: n equal steps in one direction have a ratio of n, steps
        in directions that have nothing to do with each other one of 1, and
        steps that undo each other one of nearly 0.
        """
        stages = [
            {**{each.name: getattr(stage, each.name) for each in fields(stage)}, **_ratios(stage, length)}
            for stage, length in self._so_far()
        ]
        total, last = _length(self.stages), self.stages[-1] if self.stages else None
        whole = last is not None and (last.origin == "first" or len(self.stages) == 1)
        return {
            "stages": stages,
            "steps": sum(stage.steps for stage in self.stages),
            "path": total.mean,
            "path_slices": dict(total.slices),
            "displacement": last.displacement if last is not None and whole else None,
            "displacement_slices": dict(last.displacement_slices) if last is not None and whole else {},
            **(_ratios(last, total) if last is not None and whole else {"ratio": None, "ratio_slices": {}}),
        }

    def _so_far(self) -> Iterator[tuple[Stage, PathLength]]:
        """Yield each stage, and the path from where its displacement is measured to its end."""
        for i, stage in enumerate(self.stages):
            yield stage, stage.length if stage.origin == "own" else _length(self.stages[: i + 1])

    def __str__(self) -> str:
        rows = ["stage       steps  slice          path   so far  displacement  displacement / path"]
        for stage, so_far in self._so_far():
            rows += _rows(stage, so_far)
        if any(stage.origin == "own" for stage in self.stages):
            rows.append("* from the start of that stage, or from what it was told to measure from")
        return "\n".join(rows)

    def __repr__(self) -> str:
        return f"Ledger({str(self.path)!r}, stage={self.stage!r}, origin={self.origin!r})"


def _rows(stage: Stage, so_far: PathLength) -> Iterator[str]:
    mark = "*" if stage.origin == "own" and stage.displacement is not None else ""
    name, steps = stage.stage, str(stage.steps)
    for slice_ in (None, *stage.path_slices):
        moved = stage.displacement if slice_ is None else stage.displacement_slices.get(slice_)
        own, whole = stage.length.of(slice_), so_far.of(slice_)
        yield (
            f"{name:10} {steps:>6}  {slice_ or 'all':10} {own:8.3g} {whole:8.3g} {_text(moved) + mark:>13} "
            f"{_text(_per(moved, whole)):>20}"
        ).rstrip()
        name = steps = ""


def _ratios(stage: Stage, length: PathLength) -> dict[str, Any]:
    by_slice = {name: _per(kl, length.of(name)) for name, kl in stage.displacement_slices.items()}
    return {"ratio": _per(stage.displacement, length.mean), "ratio_slices": by_slice}


def _per(displacement: float | None, path: float) -> float | None:
    return displacement / path if displacement is not None and path > 0 else None


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _length(stages: Sequence[Stage]) -> PathLength:
    return reduce(PathLength.plus, (stage.length for stage in stages), PathLength())
