"""REPORT.md, its pictures, and the page for the README: everything is computed from the runs and the config file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from study.config import PLAN, PRIMARY, Batch, Study
from study.reporting import activation, pictures
from study.reporting.activation import Activation
from study.reporting.answers import answer, answers, in_short
from study.reporting.evidence import BASELINE, Evidence, arm_of, label
from study.reporting.forks import Forks
from study.reporting.mechanisms import generalises, limits
from study.reporting.results import branching_part, grid_part, paper_part, primary_part, results_part, short_table
from study.reporting.setting import COMMANDS, activation_part, setup_part
from study.reporting.wording import bullets, counted, number, sentence
from study.traces import Run


def write(
    runs: Sequence[Run],
    branches: Sequence[Mapping[str, Any]],
    out: Path,
    *,
    study: Study | None = None,
    plan: Sequence[Batch] = PLAN,
    commands: Sequence[str] = COMMANDS,
) -> Path:
    """Write REPORT.md, summary.md and the pictures into a folder, and return the report's path.

    Args:
        runs: finished runs, of any part of the plan.
        branches: outcomes of the branching experiment; may be empty.
        out: the folder; made if it is not there.
        study: the settings of the runs; those of the config file if left out.
        plan: what should have been run.
        commands: what made the runs, for the reader.
    """
    evidence, found = Evidence(runs, branches, study or Study(), plan), activation.check(runs, branches, study)
    out.mkdir(parents=True, exist_ok=True)
    drawn = pictures.draw(evidence, Forks(branches), out)
    report = out / "REPORT.md"
    report.write_text(joined(report_parts(evidence, found, drawn, commands)))
    (out / "summary.md").write_text(joined(summary_parts(evidence, found, drawn)))
    return report


def report_parts(
    evidence: Evidence, found: Activation, drawn: Mapping[str, str], commands: Sequence[str]
) -> Iterator[str]:
    """All of the report, in order."""
    forks = Forks(evidence.branches)
    yield "# Does a trust region after the optimizer step help?"
    yield status(evidence, found)
    yield introduction(evidence)
    yield f"**Answer.** {answer(evidence)}"
    yield from primary_part(evidence)
    yield from shown(drawn, "outcomes", "differences")
    yield from activation_part(evidence, found)
    yield from shown(drawn, *(name for name in drawn if name.startswith("activation")))
    yield from setup_part(evidence, commands)
    yield from results_part(evidence)
    yield from grid_part(evidence)
    yield from shown(drawn, "learning_rates")
    yield from branching_part(forks)
    yield from shown(drawn, "branches")
    yield from paper_part(evidence)
    yield from answers_part(evidence, forks)
    yield from shown(drawn, "held_out")
    yield "## What cannot be claimed"
    yield bullets([sentence(text) for text in limits(evidence)])


def summary_parts(evidence: Evidence, found: Activation, drawn: Mapping[str, str]) -> Iterator[str]:
    """One page of it."""
    yield status(evidence, found)
    yield introduction(evidence)
    yield answer(evidence)
    yield from shown(drawn, "outcomes")
    yield short_table(evidence, PRIMARY[0])
    yield (
        f"{arm_of(PRIMARY[0]).label[:1].upper()}{arm_of(PRIMARY[0]).label[1:]}; mean ± standard deviation over "
        f"seeds; in brackets and in bold, intervals (95 %) that exclude 0. Against {label(BASELINE)} in the same arm:"
    )
    yield (
        bullets([sentence(text) for text in (*in_short(evidence), *generalises(evidence))]) or "Nothing to compare yet."
    )
    yield "All tables, pictures, settings and limits: [REPORT.md](REPORT.md)."


def status(evidence: Evidence, found: Activation) -> str:
    """Whether the study can be read at all: the first line of every page."""
    runs, absent = counted(len(evidence.whole_runs), "run"), sum(map(len, evidence.missing.values()))
    unfinished = f" Unfinished: {counted(absent, 'planned run')} missing (listed under Setup)." if absent else ""
    if found.ok:
        return f"Activation: **ok** ({runs}): every controller acted, no two are the same everywhere.{unfinished}"
    count = counted(len(found.problems), "problem")
    return f"Activation: **not ok** ({runs}): {count}, listed below, which void what they touch.{unfinished}"


def introduction(evidence: Evidence) -> str:
    """What a reader has to know to read the rest."""
    study = evidence.study
    return (
        "*In short*: PPO under LoRA with a KL penalty, for a proxy reward (words of 7 letters or more in a response of "
        f"{study.horizon} tokens, divided by 4). STEP measures how far every finished update moved the policy: K, the "
        "KL of the next-token distributions in nats per token, on control prompts of six kinds (slices). An update "
        "beyond its budget is rejected, shrunk to a part alpha of itself, or projected. *Shocks* are updates at "
        f"{number(study.shock_factor)} times the learning rate. On held-out prompts, ΔR is the gain in reward; S, in "
        "[0, 1], says how far updates stay within a tolerance; M = ΔR · S_stability · S_worst. Drift is the KL of the "
        "last policy from the first."
    )


def answers_part(evidence: Evidence, forks: Forks) -> Iterator[str]:
    """The plain answers."""
    yield "## Plain answers"
    for item in answers(evidence, forks):
        yield f"### {item.question}"
        yield bullets([sentence(text) for text in item.sentences]) or "Not measured."


def shown(drawn: Mapping[str, str], *names: str) -> Iterator[str]:
    """Pictures that were drawn, with what they say to those who cannot see them."""
    for name in names:
        if name in drawn:
            yield f"![{drawn[name]}]({name}.png)"


def joined(parts: Iterator[str]) -> str:
    """One text."""
    return "\n\n".join(parts) + "\n"
