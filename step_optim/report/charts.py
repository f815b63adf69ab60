"""The charts of a report, one function each: a run as columns becomes a Vega-Lite specification.

Colours are those of Okabe and Ito (2008), which colour-blind readers tell apart; actions have shapes, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import altair as alt
import torch
from torch import Tensor

from step_optim.report.bins import BINS, Bins
from step_optim.report.figures import slices_at_the_end
from step_optim.telemetry.columns import Columns
from step_optim.telemetry.summary import OWN

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#666666"
SKY, YELLOW = "#56B4E9", "#F0E442"

SHAPES = {"shrink": "triangle-down", "steer": "diamond", "project": "square", "reject": "cross"}
COLOURS = {"shrink": ORANGE, "steer": GREEN, "project": PURPLE, "reject": RED}
PHASE_COLOURS = {"snapshot": SKY, "audit": BLUE, "search": YELLOW}

CELLS = 90
"""Columns of the heat map at most."""

HEIGHT = 170

LABEL = 220
"""Pixels of a slice's name at most."""

BEYOND, NOT = 1e300, "not finite"
"""Where steps that are not finite are drawn, at the end of the axis; and what is said of them."""

TICK = "M-.15,-1H.15V1H-.15Z"
"""The shape of a cap."""

Row = dict[str, Any]

Chart: TypeAlias = Any
"""One of Altair's, whose own types are too narrow for their methods."""


def movement(run: Columns, top: float) -> Chart:
    """Movement of each step against its budget; markers are steps that were not committed as they were proposed."""
    bins, column = Bins.of(len(run.action)), run.figures
    candidate = column["candidate"]
    accepted, budget = column["accepted"], column["budget"]
    limited = budget.isfinite() & (budget > 0)
    tightest = bins.where_highest(torch.where(limited, accepted / budget, 1e-30 * accepted))
    rows = _rows(
        run,
        bins,
        low=bins.lowest(candidate),
        high=bins.highest(candidate),
        mean=bins.mean(candidate),
        accepted=accepted[tightest],
        budget=budget[tightest],
    )
    y = _root(top)
    base = _base(rows)
    layers: list[Chart] = [
        base.mark_area(color=SKY, opacity=0.35).encode(
            y=alt.Y("low:Q", title="nats per token", scale=y), y2="high:Q", tooltip=_tips("high", "accepted", "budget")
        ),
        base.mark_line(color=SKY, strokeWidth=1).encode(y=alt.Y("mean:Q", scale=y)),
        base.mark_line(color=BLUE, strokeWidth=1.5, point=len(rows) == 1).encode(y=alt.Y("accepted:Q", scale=y)),
        base.mark_line(color=GREY, strokeDash=[6, 3], point=len(rows) == 1).encode(y=alt.Y("budget:Q", scale=y)),
    ]
    if marks := _marks(run, bins):
        layers.append(_markers(marks, y))
    return alt.layer(*layers)


def _marks(run: Columns, bins: Bins) -> list[Row]:
    """By group and action, the step with the largest candidate, and how many there are; not finite is largest."""
    rows, candidate = [], run.figures["candidate"].nan_to_num(math.inf, math.inf).tolist()
    for action in SHAPES:
        for members in bins.members([taken == action for taken in run.action]):
            if members:
                worst = max(members, key=candidate.__getitem__)
                found = candidate[worst]
                row = {"step": int(run.step[worst]), "action": action, "steps": len(members)}
                finite = math.isfinite(found)
                row |= {"candidate": _short(found) if finite else BEYOND, "proposed": f"{found:.3g}" if finite else NOT}
                rows.append(row)
    return rows


def _markers(rows: Sequence[Row], y: alt.Scale) -> Chart:
    names = [action for action in SHAPES if any(row["action"] == action for row in rows)]
    return (
        _chart(rows)
        .mark_point(filled=True, size=45, opacity=0.9)
        .encode(
            x=_x(),
            y=alt.Y("candidate:Q", scale=y),
            color=alt.Color("action:N", scale=alt.Scale(domain=names, range=[COLOURS[n] for n in names]), title=None),
            shape=alt.Shape("action:N", scale=alt.Scale(domain=names, range=[SHAPES[n] for n in names]), title=None),
            tooltip=["step:Q", "action:N", "steps:Q", "proposed:N"],
        )
    )


def slices(run: Columns, top: float) -> Chart:
    """What was proposed, by slice: the largest movement of each group of steps."""
    bins = Bins.of(len(run.action), CELLS)
    high = bins.highest(run.slices["candidate"])
    broken = bins.highest((~run.figures["candidate"].isfinite()).double())
    rows, lost = list[Row](), list[Row]()
    for span, values, is_broken in zip(_spans(run, bins), high.tolist(), broken.tolist(), strict=True):
        for place, (name, value) in enumerate(zip(run.names, values, strict=True)):
            cell = span | {"slice": name, "place": place}
            if math.isfinite(value):
                rows.append(cell | {"movement": _short(value)})
            if is_broken:
                lost.append(cell | {"movement": NOT})
    scale, y = _root(top, scheme="viridis"), _slices_down(grid=False)
    cells = (
        _chart(rows)
        .mark_rect()
        .encode(
            x=_x(grid=False),
            x2="to:Q",
            y=y,
            color=alt.Color("movement:Q", scale=scale, title="nats per token"),
            tooltip=["slice:N", "step:Q", alt.Tooltip("movement:Q", format=".3g")],
        )
    )
    marks = (
        _chart(lost)
        .mark_point(shape="cross", color=RED, size=12, opacity=1)
        .encode(x=_x(grid=False), y=y, tooltip=["slice:N", "step:Q", "movement:N"])
    )
    return alt.layer(cells, *([marks] if lost else [])).properties(height=_height(run))


def shares(run: Columns) -> Chart:
    """The part of each step that was kept: alpha, and progress on the loss."""
    bins, column = Bins.of(len(run.action)), run.figures
    series = {"alpha": bins.mean(column["alpha"]), "progress": bins.mean(column["progress"])}
    return _lines(run, bins, series, {"alpha": BLUE, "progress": GREEN}, "share of the step", [0, 1])


def audits(run: Columns, top: float) -> Chart:
    """Audits of each step: the candidate's and those of the controller."""
    bins = Bins.of(len(run.action))
    found = run.figures["audits"]
    series = {"mean": bins.mean(found), "most": bins.highest(found)}
    return _lines(run, bins, series, {"mean": BLUE, "most": SKY}, "audits a step", [0, max(top, 1)])


def rates(run: Columns) -> Chart:
    """Triggered and rejected steps, as shares of a sliding window."""
    rejected = torch.tensor([action == "reject" for action in run.action], device="cpu")
    window = min(max(10, len(run.action) // 20), len(run.action))
    bins = Bins.of(len(run.action))
    series = {
        name: bins.final(_sliding(flags.double(), window))
        for name, flags in (("triggered", run.triggered), ("rejected", rejected))
    }
    return _lines(run, bins, series, {"triggered": ORANGE, "rejected": RED}, f"share of {window} steps", [0, 1])


def drift(run: Columns, ends: tuple[float, float]) -> Chart:
    """Displacement from pi_ref beside the path length, with the cap; on a logarithmic scale."""
    bins, column, scale = Bins.of(len(run.action)), run.figures, _log(ends)
    series = {"drift": bins.highest(column["drift"]), "path length": bins.final(run.path)}
    positive = {name: torch.where(values > 0, values, math.nan) for name, values in series.items()}
    steps = run.step[bins.first].tolist()
    chart = _drawn(steps, positive, {"drift": BLUE, "path length": GREY}, "nats per token", scale)
    cap = bins.lowest(column["cap"])
    if not bool((cap > 0).any()):
        return chart
    rule = _base(_rows(run, bins, cap=cap)).mark_line(color=RED, strokeDash=[6, 3])
    return alt.layer(chart, rule.encode(y=alt.Y("cap:Q", scale=scale)))


def drift_by_slice(run: Columns, ends: tuple[float, float]) -> Chart | None:
    """Drift of each slice at the end, with its path length and its cap; on a logarithmic scale."""
    figures = slices_at_the_end(run)
    rows = [
        {"slice": name, "place": place, "of": of, "value": _short(value)}
        for of, values in figures.items()
        for place, (name, value) in enumerate(zip(run.names, values.tolist(), strict=True))
        if 0 < value < math.inf
    ]
    if not any(row["of"] == "drift" for row in rows):
        return None
    kinds = list(figures)
    return (
        _chart(rows)
        .mark_point(size=60, filled=True, opacity=1)
        .encode(
            x=alt.X("value:Q", title="nats per token", scale=_log(ends)),
            y=_slices_down(grid=True),
            color=alt.Color("of:N", scale=alt.Scale(domain=kinds, range=[BLUE, GREY, RED]), title=None),
            shape=alt.Shape("of:N", scale=alt.Scale(domain=kinds, range=["circle", "diamond", TICK]), title=None),
            tooltip=["slice:N", "of:N", alt.Tooltip("value:Q", format=".3g")],
        )
        .properties(height=_height(run))
    )


def held_out(run: Columns, top: float) -> Chart | None:
    """Movement and drift on held-out prompts beside the control set's, where they were measured."""
    known = (~run.figures["held_out"].isnan()).nonzero().flatten()
    if not len(known):
        return None
    chosen = known[:: max(1, len(known) // BINS)]
    names = {
        "accepted": "step, control",
        "held_out": "step, held out",
        "drift": "drift, control",
        "held_out_drift": "drift, held out",
    }
    columns = {told: run.figures[name][chosen] for name, told in names.items()}
    colours = dict(zip(names.values(), (SKY, BLUE, ORANGE, RED), strict=True))
    steps = run.step[chosen].tolist()
    return _drawn(steps, columns, colours, "nats per token", _root(top), points=True)


def overhead(run: Columns, top: float) -> Chart | None:
    """Seconds a step that a bare optimizer does not take, by phase."""
    bins = Bins.of(len(run.action), CELLS)
    means = torch.stack([bins.mean(run.figures[name]) for name in OWN]).nan_to_num(0.0)
    if not bool(means.any()):
        return None
    rows = [
        span | {"phase": name, "seconds": _short(own), "from": _short(up - own), "up": _short(up)}
        for name, ups, owns in zip(OWN, means.cumsum(0).tolist(), means.tolist(), strict=True)
        for span, up, own in zip(_spans(run, bins), ups, owns, strict=True)
    ]
    scale = alt.Scale(domain=list(PHASE_COLOURS), range=list(PHASE_COLOURS.values()))
    return (
        _chart(rows)
        .mark_rect()
        .encode(
            x=_x(),
            x2="to:Q",
            y=alt.Y("from:Q", title="seconds a step", scale=alt.Scale(domain=[0, top], clamp=True)),
            y2="up:Q",
            color=alt.Color("phase:N", scale=scale, title=None),
            tooltip=["phase:N", "step:Q", alt.Tooltip("seconds:Q", format=".3g")],
        )
        .properties(height=HEIGHT)
    )


def _lines(
    run: Columns, bins: Bins, series: Mapping[str, Tensor], colours: Mapping[str, str], title: str, domain: list[float]
) -> Chart:
    scale = alt.Scale(domain=domain, clamp=True)
    return _drawn(run.step[bins.first].tolist(), series, colours, title, scale)


def _drawn(
    steps: Sequence[int],
    series: Mapping[str, Tensor],
    colours: Mapping[str, str],
    title: str,
    scale: alt.Scale,
    *,
    points: bool = False,
) -> Chart:
    """Lines by name; those that come later are dashed, so that they can be told apart without colours."""
    series = {name: values for name, values in series.items() if bool(values.isfinite().any())}
    rows = [
        {"step": step, "of": name, "value": _short(value)}
        for name, values in series.items()
        for step, value in zip(steps, values.tolist(), strict=True)
        if math.isfinite(value)
    ]
    names = list(series)
    dashes = [[1, 0], [5, 2], [2, 2], [8, 3]][: len(names)]
    chart = _chart(rows).encode(
        x=_x(),
        y=alt.Y("value:Q", title=title, scale=scale),
        color=alt.Color("of:N", scale=alt.Scale(domain=names, range=[colours[n] for n in names]), title=None),
        strokeDash=alt.StrokeDash("of:N", scale=alt.Scale(domain=names, range=dashes), title=None),
        tooltip=["of:N", "step:Q", alt.Tooltip("value:Q", format=".3g")],
    )
    lines = chart.mark_line(strokeWidth=1.5, point=points or len(steps) == 1)
    return alt.layer(lines).properties(height=HEIGHT)


def _sliding(flags: Tensor, window: int) -> Tensor:
    """The mean of the last ``window`` of them, or of as many as there are."""
    total = torch.cat([torch.zeros(1, dtype=flags.dtype, device="cpu"), flags.cumsum(0)])
    end = torch.arange(1, len(flags) + 1, device="cpu")
    start = (end - window).clamp_min(0)
    return (total[end] - total[start]) / (end - start)


def _rows(run: Columns, bins: Bins, **columns: Tensor) -> list[Row]:
    lists = {name: values.tolist() for name, values in columns.items()}
    return [
        {"step": step} | {name: _short(values[i]) for name, values in lists.items() if math.isfinite(values[i])}
        for i, step in enumerate(run.step[bins.first].tolist())
    ]


def _spans(run: Columns, bins: Bins) -> list[Row]:
    """From where to where each group of steps goes."""
    ends = zip(run.step[bins.first].tolist(), run.step[bins.last].tolist(), strict=True)
    return [{"step": start, "to": end + 1} for start, end in ends]


def _height(run: Columns) -> int:
    """Pixels of a chart with a line for each slice."""
    return max(60, 16 * len(run.names))


def _chart(rows: Sequence[Row]) -> Chart:
    return alt.Chart(alt.Data(values=list(rows)))  # type: ignore[no-untyped-call]


def _base(rows: list[Row]) -> Chart:
    return _chart(rows).encode(x=_x()).properties(height=HEIGHT)


def _x(*, grid: bool = True) -> alt.X:
    axis = alt.Axis(format="d", tickMinStep=1, grid=grid)
    return alt.X("step:Q", title="step", axis=axis, scale=alt.Scale(nice=False, zero=False))


def _slices_down(*, grid: bool) -> alt.Y:
    """Slices in their own order; a list of names would be an expression, in which some names mean something."""
    order = alt.EncodingSortField(field="place", op="min")
    return alt.Y("slice:N", title=None, sort=order, axis=alt.Axis(grid=grid, labelLimit=LABEL))


def _root(top: float, **options: Any) -> alt.Scale:
    """KL grows like the square of a step: its root is as long as the step, and 0 has a place."""
    return alt.Scale(type="sqrt", domain=[0, top], clamp=True, **options)


def _log(ends: tuple[float, float]) -> alt.Scale:
    return alt.Scale(type="log", domain=list(ends), clamp=True, nice=False)


def _tips(*names: str) -> list[alt.Tooltip]:
    return [alt.Tooltip(f"{name}:Q", format=".3g") for name in names]


def _short(value: float) -> float:
    return float(f"{value:.4g}")
