"""The page: charts of one or several runs side by side, in one file that needs no network."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from html import escape
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step_optim.host.paths import user_path
from step_optim.report.figures import figures, largest_steps
from step_optim.telemetry.columns import Columns, read_columns
from step_optim.telemetry.integrity import check_columns

if TYPE_CHECKING:
    from step_optim.report.sections import Section

DOCTYPE = "<!doctype html>"

NEEDED = "the report needs Altair and vl-convert: pip install 'step-optim[report]'"

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1500px; margin: 2rem auto;
  padding: 0 1.5rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .2rem; }
h3 { font-size: .95rem; margin: .6rem 0 0; }
p { max-width: 60rem; margin: .3rem 0; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .85rem; color: #444; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
th[scope=row] { font-weight: normal; color: #444; }
code { font-size: .8rem; overflow-wrap: anywhere; }
.runs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem 2rem; }
.chart { width: 100%; }
.scroll { overflow-x: auto; }
.ok { color: #00664b; }
.bad { color: #a33f00; font-weight: 600; }
@media print {
  body { margin: 0; max-width: none; font-size: 12px; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""

EMBED = """
for (const [id, spec] of Object.entries(JSON.parse(document.getElementById("specs").textContent)))
  vegaEmbed("#" + id, spec, {renderer: "svg", actions: false})
    .catch(error => { document.getElementById(id).textContent = "This chart could not be drawn: " + error; });
"""


def write_report(logs: Mapping[str, str | Path], path: str | Path) -> Path:
    """Write one self-contained HTML file about some runs; it loads nothing from elsewhere.

    Long runs are drawn in groups of steps, movement with the range of each.

    Args:
        logs: the path of each run's log, by label.
        path: where the page goes.

    Returns:
        That path.

    Raises:
        ImportError: Altair or vl-convert is not installed.
        ValueError: no log, one that cannot be read, or one without records; or ``path`` exists, and is no HTML page.
        OSError: a file that is not there, or cannot be written.
    """
    if not logs:
        raise ValueError("a report needs at least one log")
    out = user_path(path)
    _check_out(out)
    with ThreadPoolExecutor(1) as pool:
        bundle = pool.submit(_bundle)  # takes as long as reading a large log, in another thread
        runs = {label: read_columns(log) for label, log in logs.items()}
        page = _page(runs, bundle.result())
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f"{out.name}.part")
    unfinished.write_bytes(page.encode(errors="replace"))  # half a surrogate of a text that was cut
    unfinished.replace(out)
    return out


def _check_out(out: Path) -> None:
    """Refuse to write over what is no page: a log, say, where the page's name was forgotten."""
    if out.is_dir():
        raise ValueError(f"out={str(out)!r} is a folder; give a file, {str(out / 'report.html')!r}")
    if not out.is_file():
        return
    with out.open("rb") as file:
        begin = file.read(len(DOCTYPE))
    if begin and begin.lower() != DOCTYPE.encode():
        raise ValueError(f"out={str(out)!r} exists and is no HTML page; give another name with -o")


def _bundle() -> str:
    """The JavaScript that draws Vega-Lite charts."""
    try:
        import altair
        import vl_convert
    except ImportError as error:
        raise ImportError(NEEDED) from error
    version = altair.SCHEMA_VERSION.removeprefix("v").rsplit(".", 1)[0]
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version))


def _page(runs: Mapping[str, Columns], bundle: str) -> str:
    """Put the page together."""
    from step_optim.report.sections import sections  # needs Altair

    specs: dict[str, Any] = {}
    charts = [_section(section, runs, specs) for section in sections(list(runs.values()))]
    body = [_head(runs), *charts[:2], _largest(runs), *charts[2:], _foot(runs)]
    title = "STEP: " + ", ".join(runs)
    parts = [
        DOCTYPE,
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        *body,
        f'<script type="application/json" id="specs">{_inside_script(json.dumps(specs))}</script>',
        f"<script>{_inside_script(bundle)}</script><script>{EMBED}</script>",
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _inside_script(text: str) -> str:
    """What would end a script early is written another way, which texts of JSON and JavaScript read as the same."""
    return re.sub(r"<(?=/script|!--)", r"\\u003c", text, flags=re.IGNORECASE)


def _head(runs: Mapping[str, Columns]) -> str:
    """Title, table and integrity verdict."""
    rows = {label: figures(run) for label, run in runs.items()}
    names = next(iter(rows.values()))
    head = "".join(f"<th scope='col'>{escape(label)}</th>" for label in rows)
    lines = [
        f"<tr><th scope='row'>{escape(name)}</th>"
        + "".join(f"<td>{escape(row[name])}</td>" for row in rows.values())
        + "</tr>"
        for name in names
    ]
    table = f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return (
        f"<h1>What the controller did: {escape(', '.join(runs))}</h1><div class='scroll'>{table}</div>"
        f"<p>KL in nats per token.</p>{_verdict(runs)}"
    )


def _verdict(runs: Mapping[str, Columns]) -> str:
    """Whether every controller acted, and no two runs are one."""
    report = check_columns(runs)
    kind = "ok" if report.ok else "bad"
    return "".join(f"<p class='{kind}'>{escape(line)}</p>" for line in str(report).splitlines())


def _section(section: Section, runs: Mapping[str, Columns], specs: dict[str, Any]) -> str:
    """Draw it for every run that has something to show; nothing if none has."""
    ids, shown = count(len(specs)), []
    found = {label: section.chart(run) for label, run in runs.items()}
    if all(chart is None for chart in found.values()):
        return ""
    for label, chart in found.items():
        caption, place = "Not measured.", ""
        if chart is not None:
            name, caption = f"chart{next(ids)}", section.caption(runs[label])
            specs[name] = _spec(chart, f"{section.title}, {label}. {section.text} {caption}")
            place = f"<div class='chart' id='{name}'></div>"
        shown.append(f"<figure><h3>{escape(label)}</h3>{place}<figcaption>{escape(caption)}</figcaption></figure>")
    return (
        f"<section><h2>{escape(section.title)}</h2><p>{escape(section.text)}</p>"
        f"<div class='runs'>{''.join(shown)}</div></section>"
    )


def _largest(runs: Mapping[str, Columns]) -> str:
    """A table of the steps that were asked to move farthest, with what the loop noted of them."""
    head = "".join(f"<th scope='col'>{name}</th>" for name in ("step", "", "proposed", "worst slice", "noted"))
    shown = []
    for label, run in runs.items():
        rows = (
            (str(moved.step), moved.action, moved.candidate, moved.worst, moved.notes) for moved in largest_steps(run)
        )
        lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
        shown.append(f"<figure><h3>{escape(label)}</h3><div class='scroll'>{table}</div></figure>")
    text = "Those that would have moved the policy farthest. optimizer.note(batch=ids) tells here which batches did it."
    return f"<section><h2>Largest steps</h2><p>{text}</p><div class='runs'>{''.join(shown)}</div></section>"


def _spec(chart: Any, description: str) -> dict[str, Any]:
    """The specification of a chart that is as wide as its place, and read out as its description."""
    plain: dict[str, Any] = chart.properties(width="container", description=description).to_dict(validate=False)
    plain.pop("$schema")  # an address on the network
    plain["config"] = {
        "font": "system-ui, sans-serif",
        "view": {"stroke": None},
        "axis": {
            "grid": True,
            "gridColor": "#eee",
            "labelFontSize": 11,
            "titleFontSize": 11,
            "titleFontWeight": "normal",
        },
        "legend": {"orient": "top", "labelFontSize": 11},
    }
    return plain


def _foot(runs: Mapping[str, Columns]) -> str:
    """How each run was measured: the first line of its log, or of its latest part if it was resumed."""
    rows = []
    for label, run in runs.items():
        told = {name: value for name, value in run.header.items() if name not in ("step_optim", "audit")}
        rows += [f"<h3>{escape(label)}</h3>"]
        rows += [f"<p>{escape(name)}: <code>{escape(str(value))}</code></p>" for name, value in told.items()]
    return f"<section><h2>How it was measured</h2>{''.join(rows)}</section>"
