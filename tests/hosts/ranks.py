"""Run a function in several processes at once: gloo, kept for the next test. A hang is a failure."""

from __future__ import annotations

import atexit
import faulthandler
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 60
"""Seconds until processes that have not answered are taken to hang."""

TIMEOUT_AFTER_AN_ERROR = 20
"""The same, once one of them has raised: the others may wait for it."""


class Hang(AssertionError):
    """Some processes did not answer in time, or have ended; the message has their stacks, or exit code."""


class Workers:
    """Processes that wait for something to do; as many as were needed so far."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="step_optim_ranks_"))
        self._jobs = 0
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        atexit.register(self.stop)

    def start(self, size: int) -> None:
        """Have at least ``size`` processes, and wait until they are ready."""
        context = mp.get_context("spawn")
        new = range(len(self._processes), size)
        for rank in new:
            ours, theirs = context.Pipe()
            arguments = (theirs, self._stacks(rank), torch.get_num_threads())
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
            self._pipes.append(ours)
            self._processes.append(process)
        for rank in new:
            assert self._pipes[rank].recv() == "ready"

    def _stacks(self, rank: int) -> str:
        return str(self._folder / f"stacks{rank}")

    def run(self, job: Callable[..., Any], size: int, backend: str = "gloo", **arguments: Any) -> list[Any]:
        """Return what ``job(**arguments)`` returns in each of ``size`` processes, in the order of their ranks.

        Raises:
            Hang: one does not return.
            RuntimeError: one raises.
        """
        self.start(size)
        self._jobs += 1
        store = self._folder / f"store{self._jobs}"
        for rank in range(size):
            group = {"backend": backend, "init_method": f"file://{store}", "rank": rank, "world_size": size}
            self._pipes[rank].send((job, group, arguments))
        for rank in range(size):
            assert self._received(rank) == "connected"
        answers: dict[int, Any] = {}
        while len(answers) < size:
            waiting = {self._pipes[rank]: rank for rank in range(size) if rank not in answers}
            failed = any(error for error, _ in answers.values())
            ready = wait(list(waiting), timeout=TIMEOUT_AFTER_AN_ERROR if failed else TIMEOUT)
            if not ready:
                raise Hang(_errors(answers) + self._what_they_do(list(waiting.values())))
            for pipe in ready:
                answers[waiting[pipe]] = self._received(waiting[pipe])
        if errors := _errors(answers):
            raise RuntimeError(errors)
        return [answers[rank][1] for rank in range(size)]

    def _received(self, rank: int) -> Any:
        try:
            return self._pipes[rank].recv()
        except EOFError:
            self._processes[rank].join()
            raise Hang(f"rank {rank} has ended with exit code {self._processes[rank].exitcode}") from None

    def _what_they_do(self, ranks: list[int]) -> str:
        for rank in ranks:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
        for _ in range(100):  # they write their stacks when they are given the processor
            if all(Path(self._stacks(rank)).stat().st_size for rank in ranks):
                break
            time.sleep(0.1)
        stacks = [f"rank {rank} hangs:\n{Path(self._stacks(rank)).read_text()}" for rank in ranks]
        self.stop()
        return "\n".join(stacks)

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        shutil.rmtree(self._folder, ignore_errors=True)


def _errors(answers: dict[int, Any]) -> str:
    return "".join(f"rank {rank}:\n{text}\n" for rank, (text, _) in sorted(answers.items()) if text)


def _serve(pipe: Connection, stacks: str, threads: int) -> None:
    torch.set_num_threads(threads)
    with Path(stacks).open("w") as file:
        faulthandler.register(signal.SIGUSR1, file)
        pipe.send("ready")
        while True:
            job, group, arguments = pipe.recv()
            error, result = "", None
            if group["backend"] == "nccl":
                torch.cuda.set_device(group["rank"])
            dist.init_process_group(**group)
            dist.barrier()  # a job that needs nobody must not leave before the others are there
            pipe.send("connected")
            try:
                result = job(**arguments)
            except BaseException:
                error = traceback.format_exc()
            dist.destroy_process_group()
            pipe.send((error, result))


_workers: list[Workers] = []


def on_ranks(job: Callable[..., Any], size: int, *, backend: str = "gloo", **arguments: Any) -> list[Any]:
    """Run a module-level function in ``size`` processes; they are kept for the next call."""
    if not _workers:
        _workers.append(Workers())
    try:
        return _workers[0].run(job, size, backend, **arguments)
    except Hang:  # what they are left in is not for the next call
        _workers.pop().stop()
        raise
