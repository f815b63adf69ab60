"""What is shown while responses are drawn: nothing unless somebody looks, and never anything in the random streams."""

import io
import sys

import pytest
import torch

from step_optim import ControlSet
from step_optim.control.progress import reported
from tests.models import ragged_control, tiny_llama


class Screen(io.StringIO):
    """Stands for standard error on a terminal, or not on one."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        """Whether somebody looks."""
        return self.terminal


def screen_after(monkeypatch, progress, *, terminal: bool) -> str:
    """What stands on the screen after three items."""
    screen = Screen(terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    assert list(reported("abc", progress)) == ["a", "b", "c"]
    return screen.getvalue()


@pytest.mark.parametrize(
    ("progress", "terminal", "seen"),
    [(None, True, True), (None, False, False), (True, False, True), (True, True, True), (False, True, False)],
)
def test_who_sees_a_bar(monkeypatch, progress, terminal, seen) -> None:
    """By default a terminal alone; True shows one anywhere, False nowhere."""
    assert ("3/3" in screen_after(monkeypatch, progress, terminal=terminal)) == seen


def test_without_tqdm(monkeypatch) -> None:
    """Who did not ask for a bar gets none; who did is told what to install, before anything is drawn."""
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert screen_after(monkeypatch, None, terminal=True) == ""
    with pytest.raises(ImportError, match=r"progress=True shows a bar of tqdm; pip install tqdm"):
        ragged_control().resample(tiny_llama(), progress=True)


@pytest.mark.parametrize("progress", [1, 0, "yes"])
def test_anything_else_is_refused(progress) -> None:
    """A number is no function and no flag."""
    with pytest.raises(TypeError, match=f"progress={progress!r} is none of None, True, False and a function"):
        ragged_control().resample(tiny_llama(), progress=progress)


def test_a_function_is_told_after_each_prompt_of_a_draw() -> None:
    """(done, total), in order; the responses and the random streams are those of a silent draw."""
    told: list[tuple[int, int]] = []
    control, model = ragged_control(), tiny_llama()
    before = torch.get_rng_state()
    drawn: ControlSet = control.resample(model, max_new_tokens=3, progress=lambda *counts: told.append(counts))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert drawn == control.resample(model, max_new_tokens=3, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
