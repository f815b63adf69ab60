"""The ledger: path length against displacement, over resumes and stages of training (SFT, then DPO, then GRPO)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import reduce
from pathlib import Path
from typing import Any

from step_optim.host.paths import user_path
from step_optim.path_length import PathLength
from step_optim.telemetry.record import jsonable

SCHEMA = 1
"""Version of the file's format."""

ORIGINS = ("first", "own")
"""What displacement is measured from: the policy at the start of the first stage, or whatever the stage itself has."""


@dataclass(frozen=True)
class Stage:
    """What one stage of training has done so far. KL figures are in nats per token."""

    stage: str
    """Its name."""
    steps: int = 0
    """Steps that were decided; rejected ones count."""
    path: float = 0.0
    """Sum of K_global over its committed steps."""
    path_slices: Mapping[str, float] = field(default_factory=dict)
    """Sum of K_s, by slice."""
    displacement: float | None = None
    """KL of its latest policy from pi_ref; None if the KL closure does not measure it."""
    displacement_slices: Mapping[str, float] = field(default_factory=dict)
    """The same by slice."""
    origin: str = "first"
    """Whose start pi_ref is: that of the ``"first"`` stage, or the stage's ``"own"``."""
    began: str = ""
    """When its first step was decided, ISO 8601 in UTC."""
    ended: str = ""
    """When its latest step was."""
    budget: str = ""
    """The budget of that step."""

    @property
    def length(self) -> PathLength:
        """Its path length."""
        return PathLength(self.path, self.path_slices)

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> Stage:
        """Read what stands in a file; fields of newer versions are ignored."""
        known = {each.name: plain[each.name] for each in fields(cls) if each.name in plain}
        for name in ("path_slices", "displacement_slices"):
            known[name] = {slice_: float(kl) for slice_, kl in plain[name].items()}
        displacement = plain["displacement"]
        known |= {"stage": str(plain["stage"]), "steps": int(plain["steps"]), "path": float(plain["path"])}
        return cls(**known | {"displacement": None if displacement is None else float(displacement)})


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
        ValueError: another file than a ledger; a stage that others came after; an unknown origin.

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
        self.path, self.stage, self.origin = user_path(path), stage, origin
        self.stages = read_stages(self.path)
        """Those of the file, and this one as far as it is now."""
        names = [each.stage for each in self.stages]
        if stage in names[:-1]:
            raise ValueError(
                f"stage={stage!r} ended when {names[names.index(stage) + 1]!r} began ({self.path}). Give a new stage a "
                f"name of its own; or, to train on from there, Ledger(path).forget({names[names.index(stage) + 1]!r})"
            )
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

    def begin(self, writer: object, known: tuple[Stage, ...], now: tuple[Stage, ...]) -> None:
        """Begin with what was read, unless another run has added to it since then.

        Args:
            writer: who enters the steps of this stage from now on; one alone may.
            known: what the first process read when its ledger was made. Another one may have been too early for the
                last step of the stage before.
            now: what it reads now.

        Raises:
            RuntimeError: these differ; or another writer.
        """
        if self._writer is not None and self._writer is not writer:
            raise RuntimeError(f"{self!r} belongs to another optimizer already; make a Ledger for each")
        if now != known:
            raise RuntimeError(
                f"{self.path} was written by another run since Ledger(stage={self.stage!r}) was made: its path length "
                "would not be counted. Make the ledger and the optimizer of a stage once the stage before has ended"
            )
        self._writer, self.stages = writer, known
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
        self._written = write_stages(self.path, self.stages)

    def forget(self, stage: str) -> None:
        """Drop a stage, and all after it, whose weights are not gone on with.

        Raises:
            ValueError: there is no such stage.
        """
        names = [each.stage for each in self.stages]
        if stage not in names:
            raise ValueError(f"stage={stage!r} is not in {self.path}; it has {names}")
        self.stages = self.stages[: names.index(stage)]
        self._written = write_stages(self.path, self.stages)
        if not self.stages:
            for policy in self.path.parent.glob(f"{self.path.stem}.pi_ref*.pt"):
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


def read_stages(path: Path) -> tuple[Stage, ...]:
    """Read the stages of a ledger's file; none if there is no file.

    Raises:
        ValueError: it is another file, or of a newer version.
    """
    if not path.exists():
        return ()
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        if (schema := plain["step_optim_ledger"]) > SCHEMA:
            raise ValueError(f"it has schema {schema}, this version reads up to {SCHEMA}; upgrade")
        return tuple(map(Stage.read, plain["stages"]))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read as a ledger ({type(error).__name__}: {error}); choose another path"
        ) from error


def write_stages(path: Path, stages: Sequence[Stage]) -> str:
    """Write a ledger's file and return what stands in it.

    A reader, and a run that is killed meanwhile, finds the old one or the new one.
    """
    plain = {"step_optim_ledger": SCHEMA, "stages": [jsonable(vars(stage)) for stage in stages]}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.part")
    text = json.dumps(plain, allow_nan=False)
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
    return text
