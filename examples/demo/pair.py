"""Run both halves of the demo at once, each in a process of its own.

Small matrices gain little from a second core, so two runs on one core each finish sooner than one after the other on
both; and one sees the same update with STEP and without at the same time.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from demo.report import RUNS, RunResult
from demo.screen import Screen

if TYPE_CHECKING:
    from demo.arguments import Args
    from step_optim import StepRecord

CONTEXT = multiprocessing.get_context("spawn")  # a fork would share the thread pools of whatever is loaded already


EXIT_SECONDS = 10.0
"""How long a worker may take to leave before it is killed."""


class WorkerFailed(RuntimeError):
    """A run ended without a result; the message is its traceback."""


class Reporter:
    """What a run tells the screen, sent through a pipe."""

    def __init__(self, connection: Connection, run: str) -> None:
        self._connection, self._run = connection, run

    def working(self, what: str) -> None:
        """Say what happens right now."""
        self._connection.send(("working", self._run, what))

    def show(self, response: str) -> None:
        """Show one of the responses that the policy just gave."""
        self._connection.send(("show", self._run, response))

    def update(self, number: int, record: StepRecord) -> None:
        """Show a finished update."""
        self._connection.send(("update", self._run, number, record))


def run_pair(args: Args, source: str, screen: Screen) -> list[RunResult]:
    """Train with STEP and without; return the results in this order.

    Raises
        WorkerFailed: one of the runs did not finish; the other is ended.
    """
    with ExitStack() as stack:
        pipes = {stack.enter_context(worker(args, source, run)): run for run in RUNS}
        return collect(pipes, screen)


def collect(pipes: dict[Connection, str], screen: Screen) -> list[RunResult]:
    """Pass on to the screen what the workers tell, until both have finished."""
    results: dict[str, RunResult] = {}
    while len(results) < len(pipes):
        for pipe in wait([pipe for pipe, run in pipes.items() if run not in results]):
            what, *arguments = receive(pipe, pipes[pipe])
            if what == "done":
                (results[pipes[pipe]],) = arguments
            else:
                getattr(screen, what)(*arguments)
    return [results[run] for run in pipes.values()]


def receive(pipe: Any, run: str) -> tuple[Any, ...]:
    """Return the next message of a worker.

    Raises
        WorkerFailed: there will be none.
    """
    try:
        message: tuple[Any, ...] = pipe.recv()
    except EOFError:
        raise WorkerFailed(f"The run {run} ended without a word; was it killed, or out of memory?") from None
    if message[0] == "failed":
        raise WorkerFailed(f"The run {run} failed:\n{message[1]}")
    return message


@contextmanager
def worker(args: Args, source: str, run: str) -> Iterator[Connection]:
    """Start one run, and end it when the context is left, finished or not."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=work, args=(sender, args, source, run), daemon=True)
    # Ctrl-C reaches every process of the terminal; only the one that draws shall answer it.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    sender.close()  # the worker has its own end; with ours open, its death would go unnoticed
    try:
        yield receiver
        process.join(EXIT_SECONDS)  # it has told its result and is on its way out
    finally:
        process.terminate()
        process.join(EXIT_SECONDS)
        process.kill()


def work(connection: Connection, args: Args, source: str, run: str) -> None:
    """Do one run, in the worker's process."""
    # Ended from outside, it leaves in good order: an update that is under way is rolled back and recorded as such.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    warnings.simplefilter("ignore")  # of the libraries underneath: the screen belongs to the demo
    try:
        import demo.run  # seconds of imports, which --help and the first line on the screen do not wait for

        connection.send(("done", demo.run.run(args, source, run, Reporter(connection, run))))
    except Exception:
        connection.send(("failed", traceback.format_exc()))
