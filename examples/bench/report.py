"""The markdown file of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bench import SHRINK_TO
from goals import goals
from workload import BATCH, LENGTH

KINDS = {"lora": "LoRA, rank 8 on all linear layers", "full": "full fine-tuning"}
CURVES = {"prompts": "control prompts", "vocabulary": "vocabulary (small random body)", "parameters": "parameters"}


def markdown(result: dict[str, Any]) -> str:
    """Everything that was measured, as tables."""
    sections = result["sections"]
    parts = [*_top(result), *_goals(sections)]
    for kind, step in sections.get("step", {}).items():
        parts += _step(kind, step)
    for name, write in {
        "search": _search,
        "curves": _curves,
        "numerics": _numerics,
        "noise": _noise,
        "graph": _graph,
    }.items():
        if name in sections:
            parts += write(sections[name])
    if result["skipped"]:
        parts += ["## Left out", "\n".join(f"- {text}" for text in result["skipped"])]
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; all columns but the first are figures."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _top(result: dict[str, Any]) -> Iterator[str]:
    machine, control = result["machine"], result["control"]
    yield "# What an audited step costs"
    yield f"`{result['command']}`"
    texts = (
        f"{control['prompts']} prompts, {control['rows']} response rows, {control['real']} real tokens, "
        f"{control['padded']} padded to one batch"
    )
    rows = {
        "device": machine["device"],
        "versions": machine["versions"],
        "model": f"{result['model']}, {machine['dtype']}",
        "control set": texts,
        "training batch": f"{BATCH} x {LENGTH} tokens, AdamW",
        "rounds": f"{result['rounds']}, interleaved; medians, in brackets the range of the paired ratios",
        "date": machine["date"],
    }
    yield "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])
    yield (
        "*Plain control forward*: one forward over the control set as one padded batch, with all its logits. "
        "*Overhead*: (method - bare step) / plain control forward. *Naive*: the paper's Algorithm 1 as written "
        "([naive.py](naive.py)); today's methods are in [today.py](today.py). A triggered step has a budget of "
        f"{SHRINK_TO:g} of what its candidate moves. Peaks are above what was held when the step began."
    )


def _goals(sections: dict[str, Any]) -> Iterator[str]:
    found = goals(sections)
    if not found:
        return
    full = {goal.what: goal.shown(goal.value) for goal in goals(sections, "full")}
    yield "## Goals"
    head = ["figure", "measured (LoRA)", "goal", "stretch", "", "full fine-tuning, no goal"]
    yield table(head, ([*goal.cells(), full.get(goal.what, "")] for goal in found))


def _step(kind: str, step: dict[str, Any]) -> Iterator[str]:
    yield f"## One step, {KINDS[kind]}"
    yield (
        f"The candidate moves {step['candidate_kl']:.3g} nats per token on the control set (lr {step['lr']:.2g}); "
        f"TokenKL reads `{step['readout']}`. From step to step STEP keeps {step['kept'] / 1e6:.3g} MB."
    )
    head = ["method", "seconds", "time / bare step", "overhead", "audits more", "peak of the step", "after backward"]
    yield table(head, (_method(name, row) for name, row in step["methods"].items()))
    phases = {name: row for name, row in step["methods"].items() if "snapshot" in row}
    yield "What STEP itself logs, in milliseconds:"
    yield table(
        ["", "inner", "snapshot", "audit", "search"],
        (
            [name, *(f"{1e3 * row[phase]['median']:.1f}" for phase in ("inner", "snapshot", "audit", "search"))]
            for name, row in phases.items()
        ),
    )


def _method(name: str, row: dict[str, Any]) -> list[str]:
    trials = f"{row['trials']['median']:g}" if "trials" in row else ""
    over = "" if name in ("bare", "forward") else _ranged(row["overhead"])
    memory = [f"{row[peak] / 1e6:.3g} MB" if peak in row else "" for peak in ("peak_run", "peak_step")]
    return [name, f"{row['seconds']['median']:.3g}", _ranged(row["ratio"]), over, trials, *memory]


def _ranged(figure: dict[str, float]) -> str:
    return f"{figure['median']:.2f} ({figure['low']:.2f} to {figure['high']:.2f})"


def _search(search: dict[str, Any]) -> Iterator[str]:
    problems = search["problems"]
    memory = ", with its memory of the last curve" if "model, without memory" in search["searches"] else ""
    yield "## Searches"
    yield (
        f"{len(problems)} problems: {len({problem['kl'] for problem in problems})} real candidate steps under LoRA, of "
        f"{min(p['kl'] for p in problems):.2g} to {max(p['kl'] for p in problems):.2g} nats per token, at budgets of "
        f"{', '.join(f'{part:g}' for part in sorted({p['part'] for p in problems}))} of that. Audits beyond the "
        f"candidate's. `Interpolate()` is the model search{memory}."
    )
    rows = (
        [name, f"{row['mean']:.2f}", f"{row['p90']}", f"{row['max']}", f"{row['within']:.0%}"]
        for name, row in search["searches"].items()
    )
    yield table(["search", "mean", "p90", "max", "alpha within 1 % of the best"], rows)


def _curves(curves: dict[str, Any]) -> Iterator[str]:
    yield "## Cost curves, LoRA"
    for name, points in curves.items():
        rows = (
            [
                f"{point['x']:,}",
                *(f"{point['seconds'][method]['median']:.3g}" for method in ("bare", "forward", "STEP commit")),
                _of(point, "STEP commit", "overhead"),
                _of(point, "naive commit", "seconds"),
                _of(point, "naive commit", "overhead"),
            ]
            for point in points
        )
        head = [CURVES[name], "bare step [s]", "plain forward [s]", "STEP commit [s]", "overhead"]
        yield table([*head, "naive commit [s]", "overhead"], rows)


def _of(point: dict[str, Any], method: str, what: str) -> str:
    return f"{point[what][method]['median']:.3g}" if method in point[what] else ""


def _numerics(points: list[dict[str, float]]) -> Iterator[str]:
    yield "## Numerics"
    yield (
        "Error of the mean KL in float32 against float64, from the model's own hidden states in float32: relative, and "
        "absolute where nothing moved."
    )
    rows = ([f"{p['kl']:.2g}", f"{p['step_optim']:.1e}", f"{p['textbook']:.1e}"] for p in points)
    yield table(["KL [nats]", "step_optim", "textbook sum"], rows)


def _noise(found: list[dict[str, Any]]) -> Iterator[str]:
    yield "## Noise floor"
    yield "What an audit of eight prompts reads of a movement that is known to be next to nothing, in nats per token."
    rows = ([f["dtype"], f"{f['measured']:.1e}", f"{f['expected']:.1e}"] for f in found)
    yield table(["audit in", "reads", "is"], rows)


def _graph(found: dict[str, Any]) -> Iterator[str]:
    roof = found["roofline"]
    yield "## How near to the device's peak"
    rates = (
        f"{roof['body_flops'] / 1e12:.3g} TFLOP/s in the model's dtype, {roof['head_flops'] / 1e12:.3g} in float32, "
        f"{roof['bytes'] / 1e9:.3g} GB/s"
    )
    yield (
        f"An audit takes {1e3 * roof['audit']:.3g} ms. At the rates measured here ({rates}) its arithmetic needs "
        f"{1e3 * roof['arithmetic']:.3g} ms and its memory traffic {1e3 * roof['traffic']:.3g} ms: it runs at "
        f"{roof['share']:.0%} of the larger bound."
    )
    if "graph" in found:
        graph = found["graph"]
        yield (
            f"The plain micro-batched control forward takes {1e3 * graph['eager']:.3g} ms eagerly and "
            f"{1e3 * graph['graph']:.3g} ms as a CUDA graph; their logits differ by at most "
            f"{graph['largest_difference']:.1e}."
        )
