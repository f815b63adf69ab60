"""Make the runs that are missing, several at a time, and say how long it will take."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study.config import BRANCHES, Study

CONTEXT = multiprocessing.get_context("spawn")  # a fork would share the thread pools of whatever is loaded already
EXIT_SECONDS = 10.0


@dataclass(frozen=True)
class Task:
    """A run, or the branches from one state."""

    arm: str
    """or: branches"""
    condition: str
    seed: int
    t: int = -1
    """of the branches"""

    def __str__(self) -> str:
        return f"branches/{self.seed}/{self.t}" if self.t >= 0 else f"{self.arm}/{self.condition}/{self.seed}"

    def parts(self, study: Study) -> int:
        """Into how many parts it is divided, in what it tells of its progress."""
        return len(BRANCHES) if self.t >= 0 else study.updates

    def file(self, root: Path) -> Path:
        """Where its result is once it is finished."""
        if self.t >= 0:
            return root / "branches" / str(self.seed) / f"{self.t}.json"
        return root / self.arm / self.condition / str(self.seed) / "run.json"


@dataclass(frozen=True)
class Job:
    """What a worker needs to know."""

    study: Study
    root: Path
    device: str
    small: bool


class TaskFailed(RuntimeError):
    """Some tasks did not finish; the message has their tracebacks."""


def work_off(job: Job, tasks: Sequence[Task], workers: int) -> None:
    """Finish all tasks that have no result yet.

    Raises:
        TaskFailed: some could not, the others are done; or another study is at work in the folder.
    """
    with alone(job.root):
        work_off_alone(job, tasks, workers)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Refuse to work in a folder in which another study is at work: both would write the same files."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TaskFailed(f"another study is at work in {folder}; wait for it, or choose another --runs") from None
        yield


def work_off_alone(job: Job, tasks: Sequence[Task], workers: int) -> None:
    """Finish all tasks that have no result yet, in this folder."""
    missing = [task for task in tasks if not task.file(job.root).exists()]
    progress = Progress(job.study, tasks, missing, workers)
    failures: list[str] = []
    for branching in (False, True):  # branches begin at states that runs have kept
        failures += work_off_some(job, [task for task in missing if (task.t >= 0) is branching], workers, progress)
    if failures:
        raise TaskFailed("\n".join(failures))


def work_off_some(job: Job, missing: Sequence[Task], workers: int, progress: Progress) -> list[str]:
    """Finish tasks that do not depend on each other; return what went wrong."""
    failures: list[str] = []
    with pool(job, missing, min(workers, len(missing))) as (processes, told):
        open_tasks = set(missing)
        while open_tasks:
            try:
                task, what, value = told.get(timeout=1.0)
            except queue.Empty:
                if not any(process.is_alive() for process in processes):
                    failures.append(f"{len(open_tasks)} tasks are open, and every worker is gone; out of memory?")
                    break
                continue
            if what == "part":
                progress.part(task, value)
                continue
            open_tasks.discard(task)
            if what == "failed":
                failures.append(f"{task} failed:\n{value}")
                what = f"failed ({value.strip().splitlines()[-1]}); the others go on"
            progress.finished(task, what)
    return failures


class Progress:
    """Says what is being done, and how much time is left."""

    def __init__(self, study: Study, tasks: Sequence[Task], missing: Sequence[Task], workers: int) -> None:
        self._study, self._missing, self._total = study, missing, len(tasks)
        self._started = time.monotonic()
        self._done = len(tasks) - len(missing)
        self._first: dict[Task, int] = {}
        self._reached: dict[Task, int] = {}
        print(f"{self._done} of {self._total} tasks are done; {len(missing)} to do, {workers} at a time", flush=True)

    def part(self, task: Task, number: int) -> None:
        """A task begins one of its parts; a resumed one does not begin with the first."""
        self._first.setdefault(task, number)
        self._reached[task] = number
        self._print(f"{task}, {number} of {task.parts(self._study)}")

    def finished(self, task: Task, how: str) -> None:
        """A task is over."""
        self._done += 1
        self._reached[task] = task.parts(self._study)
        self._print(f"{task} {how}")

    def _print(self, what: str) -> None:
        elapsed = time.monotonic() - self._started
        made = sum(weight(task) * (number - self._first.get(task, number)) for task, number in self._reached.items())
        left = sum(weight(task) * (task.parts(self._study) - self._reached.get(task, 0)) for task in self._missing)
        guess = f", about {minutes(elapsed * left / made)} left" if made else ""
        print(f"[{self._done}/{self._total}] {minutes(elapsed)}: {what}{guess}", flush=True)


def weight(task: Task) -> float:
    """About how long a part of a task takes, in updates."""
    return 3.0 if task.t >= 0 else 1.0


def minutes(seconds: float) -> str:
    """Say a time.

    >>> minutes(3 * 3600 + 65)
    '3 h 01 min'
    """
    whole = max(0, round(seconds / 60))
    return f"{whole // 60} h {whole % 60:02} min" if whole >= 60 else f"{whole} min"


@contextmanager
def pool(job: Job, tasks: Sequence[Task], workers: int) -> Iterator[tuple[list[Any], Any]]:
    """Start the workers, and end them when the context is left."""
    to_do, told = CONTEXT.Queue(), CONTEXT.Queue()
    for task in [*tasks, *[None] * workers]:
        to_do.put(task)
    processes = [CONTEXT.Process(target=worker, args=(job, to_do, told), daemon=True) for _ in range(workers)]
    # Ctrl-C reaches every process of the terminal; only this one shall answer it.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for process in processes:
            process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        yield processes, told
        for process in processes:
            process.join(EXIT_SECONDS)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(EXIT_SECONDS)
            process.kill()


def worker(job: Job, to_do: Any, told: Any) -> None:
    """Work off tasks, in a process of its own."""
    threading.Thread(target=leave_with_parent, daemon=True).start()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")  # of the libraries underneath
    import torch

    from study.running import branching, training, world

    torch.set_num_threads(1)  # what a run rounds to must not depend on how many are made at a time
    here = None
    while (task := to_do.get()) is not None:
        try:
            here = here or world.load(job.study, job.root, job.device, small=job.small)

            def say(number: int, task: Task = task) -> None:
                told.put((task, "part", number))

            if task.t >= 0:
                branching.make_branches(here, task.seed, task.t, job.root, say)
            else:
                training.make_run(here, (task.arm, task.condition, task.seed), job.root, say)
            told.put((task, "done", None))
        except Exception:
            told.put((task, "failed", traceback.format_exc()))


def leave_with_parent() -> None:
    """End this worker when the study is killed: it would go on, beside the study that is started again."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
