"""A section about a run for its model card."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from step_optim.host.paths import user_path
from step_optim.optimizer import STEPOptimizer

BEGIN, END = "<!-- step_optim: begin -->", "<!-- step_optim: end -->"
"""Around the section, so that it is replaced and not repeated."""


def section(optimizer: STEPOptimizer) -> str:
    """Return how far the model was allowed to move, and how far it did, in Markdown.

    The figures are those of `STEPOptimizer.summary`.
    """
    header, figures = optimizer.describe(), optimizer.summary()
    rows = [
        ("Budget", f"`{header['budget']}`"),
        ("Controller", f"`{header['controller']}`"),
        ("Inner optimizer", f"`{header['optimizer']}`"),
        ("Measured by", f"`{header['kl']}`"),
        *_figures(figures),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        f"{BEGIN}\n## Trust region\n\n"
        "Optimizer steps were audited with `step_optim`: how far each moved the policy was measured on a fixed control "
        "set, as a mean KL in nats, and a step over the budget was shortened, steered or rejected. Movement on other "
        f"prompts was not bounded.\n\n| | |\n| --- | --- |\n{table}\n{END}\n"
    )


def _figures(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the rows of what came out; none of what was not measured."""
    yield "Steps", f"{figures['steps']}"
    yield "Over budget", _share(figures["trigger_rate"])
    yield "Rejected", _share(figures["rejection_rate"])
    for name, what in (
        ("mean_alpha", "Mean alpha of the steps over budget"),
        ("max_accepted_kl", "Largest committed step"),
        ("max_accepted_slice_kl", "Largest committed step of a slice"),
        ("path_length", "Path length, the sum of all steps"),
        ("reference_drift", "Drift from the policy at the start"),
        ("generalisation_drift", "Drift on held-out prompts / on the control set"),
    ):
        if figures[name] is not None:
            yield what, f"{figures[name]:.4g}"
    for name, drift in figures["reference_drift_by_slice"].items():
        yield f"Drift of slice {_in_a_cell(name)}", f"{drift:.4g}"


def _in_a_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _share(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.1%}"


def add_section(path: str | Path, text: str) -> None:
    """Put a section at the end of a model card, and take an older one out; a card that is not there is begun.

    Args:
        path: of the card, README.md.
        text: as `section` returns it.

    Raises:
        ValueError: an older section has no end.
    """
    card = user_path(path)
    old = card.read_text(encoding="utf-8") if card.exists() else ""
    without = re.sub(rf"\n*^{BEGIN}$(?:(?!^{BEGIN}$).)*?^{END}$\n?", "\n", old, flags=re.DOTALL | re.MULTILINE).rstrip()
    if re.search(rf"^{BEGIN}$", without, flags=re.MULTILINE):
        raise ValueError(f"{card} has a line {BEGIN!r} without a line {END!r} after it; take it out")
    card.parent.mkdir(parents=True, exist_ok=True)
    card.write_text(f"{without}\n\n{text}" if without else text, encoding="utf-8")
