"""The real trackers, offline: every record arrives, on an axis of its own, and what is unusual is told."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest

from step_optim import Action, Movement, StepRecord
from step_optim.limits import Limits
from step_optim.telemetry import Tracker, open_log
from tests.hosts.text import forget_accelerator

KLS = (0.01, math.nan, 0.25, math.inf, 0.5, 0.02)
"""Of the candidates; the budget is 0.125."""

OTHERS = 3
"""How often the training loop logs beside each step, without a step."""


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch) -> Iterator[None]:
    """Everything stays in a folder of the test; what the libraries warn of is theirs."""
    for name, value in (
        ("TRACKIO_DIR", str(tmp_path / "trackio")),
        ("WANDB_MODE", "offline"),
        ("WANDB_SILENT", "true"),
        ("WANDB_DIR", str(tmp_path)),
        ("MLFLOW_ALLOW_FILE_STORE", "true"),
        ("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri()),
        ("HF_HUB_OFFLINE", "1"),
    ):
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
        forget_accelerator()


def records() -> list[StepRecord]:
    """Committed, shrunk and rejected steps; candidates that are not finite; a slice that no tracker may choke on."""
    found = []
    for step, kl in enumerate(KLS):
        over, finite = not kl <= 0.125, math.isfinite(kl)
        action = Action.COMMIT if not over else Action.SHRINK if finite else Action.REJECT
        accepted = min(kl, 0.125) if finite else 0.0
        found.append(
            StepRecord(
                step,
                action,
                Movement(kl, {"why?": kl, "math": kl}),
                Movement(accepted, {"why?": accepted, "math": accepted}),
                Limits(mean=0.125),
                triggered=over,
                bound="mean" if over else None,
                alpha=None if action is Action.REJECT else 1.0,
                notes={"phase": "first", "batch": [3, 5]},
            )
        )
    return found


def log_all(log: Any, others: Callable[[], Any] = lambda: None) -> None:
    """Give every record to a log; the training loop logs its own between them."""
    sink = open_log(log, dict)
    for record in records():
        sink(record)
        for _ in range(OTHERS):
            others()


def same(found: list[tuple[Any, Any]]) -> None:
    """Each step once, with the candidate's KL of that step."""
    assert [step for step, _ in found] == list(range(len(KLS)))
    assert [value for _, value in found] == pytest.approx(list(KLS), nan_ok=True)


TOLD = ["Step 1: the candidate is not finite; reject.", "Step 2: mean at 2 times its budget; shrink, alpha 1."]


# -- reading back -----------------------------------------------------------------------------------------------------


def tensorboard_events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = {file.parent for file in folder.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(file))
    events.Reload()
    return events


def check_tensorboard(folder: Path) -> None:
    events = tensorboard_events(folder)
    same([(each.step, each.value) for each in events.Scalars("step_optim/candidate/slices/why?")])
    assert [each.value for each in events.Scalars("step_optim/rejected")] == [0, 1, 0, 1, 0, 0]
    assert not any("budget/drift" in tag for tag in events.Tags()["scalars"])  # infinite, and no curve
    alerts = events.Tensors("step_optim/alerts/text_summary")
    texts = [each.tensor_proto.string_val[0].decode() for each in alerts]
    assert [text.partition("** ")[2] for text in texts] == TOLD
    assert [each.step for each in alerts] == [1, 2]


def check_mlflow(run: Any) -> None:
    import mlflow

    history = mlflow.MlflowClient().get_metric_history
    same([(each.step, each.value) for each in history(run, "step_optim/candidate/slices/why_x3f_")])
    assert [each.value for each in history(run, "step_optim/triggered")] == [0, 1, 1, 1, 1, 0]


def check_trackio(project: str, run: str | None = None) -> None:
    from trackio.sqlite_storage import SQLiteStorage

    run = run or SQLiteStorage.get_runs(project)[0]
    rows = [row for row in SQLiteStorage.get_logs(project, run) if "step_optim/step" in row]
    same([(row["step_optim/step"], row["step_optim/candidate/slices/why?"]) for row in rows])
    assert all(row["step"] == row["step_optim/step"] for row in rows)
    assert {row["step_optim/notes/phase"] for row in rows} == {"first"}
    assert sorted(alert["text"] for alert in SQLiteStorage.get_alerts(project)) == TOLD


def wandb_records(folder: Path) -> list[Any]:
    """What an offline run has written to its file: records in LevelDB's log format, after 7 bytes of W&B's."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # a run that is finished may still be on its way to the file
    (file,) = folder.rglob("*.wandb")
    data, place, found, parts = file.read_bytes(), 7, [], b""
    while place < len(data):
        if 32768 - place % 32768 < 7:  # the end of a block, too short for the head of a piece
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def wandb_rows(folder: Path) -> list[dict[str, Any]]:
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in wandb_records(folder)
        if record.WhichOneof("record_type") == "history"
    ]


def check_wandb(folder: Path) -> None:
    written, rows = wandb_records(folder), wandb_rows(folder)
    ours = [row for row in rows if "step_optim/step" in row]
    same([(row["step_optim/step"], float(row["step_optim/candidate/slices/why?"])) for row in ours])
    assert len({row["_step"] for row in ours}) == len(KLS)
    assert sum("loss" in row for row in rows) == OTHERS * len(KLS)
    assert [record.alert.text for record in written if record.WhichOneof("record_type") == "alert"] == TOLD
    axes = [record.metric for record in written if record.WhichOneof("record_type") == "metric"]
    assert any(axis.step_metric == "step_optim/step" for axis in axes)


# -- each of them -----------------------------------------------------------------------------------------------------


def test_tensorboard(tmp_path) -> None:
    """A `SummaryWriter` gets scalars over the step of the record, and alerts as texts."""
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(tmp_path / "board") as writer:
        log_all(writer)
    check_tensorboard(tmp_path / "board")


@pytest.mark.parametrize("way", ["module", "function"])
def test_mlflow(way) -> None:
    """Numbers, by names that it takes; the training loop's own metrics keep their steps."""
    mlflow = pytest.importorskip("mlflow")
    with mlflow.start_run() as run:
        log_all(mlflow if way == "module" else mlflow.log_metrics, lambda: mlflow.log_metric("loss", 1.0))
    check_mlflow(run.info.run_id)


@pytest.mark.parametrize("way", ["module", "function", "run", "method"])
def test_trackio(way, monkeypatch, tmp_path) -> None:
    """Every record is a row at its own step, however often the training loop logs, and alerts are sent."""
    trackio = pytest.importorskip("trackio")
    point_trackio_to(tmp_path, monkeypatch)
    run = trackio.init(project=way, name="run", embed=False)
    log_all(
        {"module": trackio, "function": trackio.log, "run": run, "method": run.log}[way],
        lambda: trackio.log({"loss": 1.0}),
    )
    trackio.finish()
    check_trackio(way, "run")


def point_trackio_to(folder: Path, monkeypatch: Any) -> None:
    """It has read its folder from the environment when it was imported."""
    import trackio.sqlite_storage
    import trackio.utils

    for module in (trackio, trackio.utils, trackio.sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", folder / "trackio", raising=False)


@pytest.mark.parametrize("way", ["module", "function", "run", "method"])
def test_wandb(way, tmp_path) -> None:
    """Every record is a row with an axis of its own, however often the training loop logs, and alerts are sent."""
    wandb = pytest.importorskip("wandb")
    run = wandb.init(project="test", dir=tmp_path)
    log_all(
        {"module": wandb, "function": wandb.log, "run": run, "method": run.log}[way], lambda: run.log({"loss": 1.0})
    )
    run.finish()
    check_wandb(tmp_path)


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "trackio", "wandb"])
@pytest.mark.parametrize("bound", [False, True])
def test_accelerate(name, bound, tmp_path, monkeypatch) -> None:
    """Through an Accelerator each of them gets what it gets alone."""
    pytest.importorskip(name)
    if name == "trackio":
        point_trackio_to(tmp_path, monkeypatch)
    accelerator = accelerate.Accelerator(cpu=True, log_with=name, project_dir=tmp_path)
    kwargs = {"trackio": {"embed": False}, "wandb": {"dir": str(tmp_path)}}.get(name, {})
    accelerator.init_trackers("project", init_kwargs={name: kwargs})
    others = (lambda: accelerator.log({"loss": 1.0})) if name in ("wandb", "trackio") else (lambda: None)
    log_all(accelerator.log if bound else accelerator, others)
    run = accelerator.get_tracker(name, unwrap=True)
    accelerator.end_training()
    {
        "tensorboard": lambda: check_tensorboard(tmp_path),
        "mlflow": lambda: check_mlflow(run.info.run_id),
        "trackio": lambda: check_trackio("project"),
        "wandb": lambda: check_wandb(tmp_path),
    }[name]()


ODD = ("why?", "why_x3f_", "/step", "", "..", "a/", "a", "a/b", "x" * 260, "ünï 日本", "mean")
"""Slices whose names MLflow refuses, or may take for each other."""


def test_mlflow_keeps_slices_with_odd_names_apart() -> None:
    """Each has a curve of its own."""
    mlflow = pytest.importorskip("mlflow")
    moved = Movement(1.0, {name: float(place) for place, name in enumerate(ODD)})
    with mlflow.start_run() as run:
        open_log(mlflow, dict)(StepRecord(0, Action.COMMIT, moved, moved, Limits()))
    metrics = mlflow.MlflowClient().get_run(run.info.run_id).data.metrics
    found = [value for name, value in metrics.items() if name.startswith("step_optim/candidate/slices/")]
    assert sorted(found) == [float(place) for place in range(len(ODD))]


def test_two_optimizers_share_wandb_rows(tmp_path) -> None:
    """With names of their own, and a training loop that logs at steps of its own, nothing is lost."""
    wandb = pytest.importorskip("wandb")
    run = wandb.init(project="test", dir=tmp_path)
    sinks = [open_log(Tracker(run, name=name), dict) for name in ("actor", "critic")]
    for step, record in enumerate(records()):
        run.log({"loss": 1.0}, step=step)
        for sink in sinks:
            sink(record)
    run.finish()
    rows = [row for row in wandb_rows(tmp_path) if "loss" in row]
    assert [row["_step"] for row in rows] == list(range(len(KLS)))
    for name in ("actor", "critic"):
        same([(row[f"step_optim/{name}/step"], float(row[f"step_optim/{name}/candidate/mean"])) for row in rows])


def test_which_alerts_are_sent_is_the_users_choice(tmp_path) -> None:
    """`Tracker(run, alerts=())` sends none, and keeps every record."""
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(tmp_path / "board") as writer:
        log_all(Tracker(writer, alerts=()))
    events = tensorboard_events(tmp_path / "board")
    same([(each.step, each.value) for each in events.Scalars("step_optim/candidate/mean")])
    assert not events.Tags()["tensors"]
