"""The folders of the package import downwards only, and the files of a folder in no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import step_optim

PACKAGE = Path(step_optim.__file__).parent

LAYERS = (
    ("host", "precision"),
    ("movement", "path_length"),
    ("limits", "snapshot", "objective"),
    ("trigger_rate", "bound"),
    ("warm_up",),
    ("budget",),
    ("isolation",),
    ("control",),
    ("audit",),
    ("controllers",),
    ("telemetry",),
    ("step",),
    ("flight",),
    ("optimizer",),
    ("report", "hosts"),
    ("testing", "integrity", "__main__"),
    ("__init__",),
)
"""From the ground up; those of one layer do not know each other."""

FACES = {"integrity": {"__main__"}}
"""What a file imports only when it is run as a program."""

FILES = sorted(PACKAGE.rglob("*.py"))


def folder_of(module: str) -> str:
    """The part of the package that a module belongs to."""
    return module.split(".")[0] or "__init__"


def name_of(file: Path) -> str:
    """The dotted name of a file, without that of the package."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


def imports(file: Path) -> Iterator[str]:
    """The modules of the package that a file imports, in functions and for type checkers too."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write imports in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "step_optim":
                inner = parts[1:]
                while inner and not (
                    PACKAGE.joinpath(*inner).is_dir() or PACKAGE.joinpath(*inner).with_suffix(".py").exists()
                ):
                    inner = inner[:-1]
                yield ".".join(inner)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_every_file_imports_downwards(file) -> None:
    """What is above is not known below."""
    floor = {folder: level for level, folders in enumerate(LAYERS) for folder in folders}
    own = folder_of(name_of(file))
    for module in imports(file):
        other = folder_of(module)
        if other != own and other not in FACES.get(own, ()):
            assert floor[other] < floor[own], f"{name_of(file)} imports {module}, which is not below it"


def test_there_is_no_circle() -> None:
    """A file can be read before those that import it."""
    graph = {name_of(file): set(imports(file)) - {name_of(file)} for file in FILES}
    for name in list(graph):
        if name.endswith("__init__"):  # a folder's face: importing the folder is importing it
            graph[name.removesuffix(".__init__")] = graph.pop(name)
    done: set[str] = set()
    while ready := {name for name, known in graph.items() if name not in done and not (known & graph.keys()) - done}:
        done |= ready
    assert done == graph.keys(), sorted(graph.keys() - done)


def test_torch_is_not_needed_for_movement_and_budget() -> None:
    """Figures and limits are plain python."""
    for name in ("precision", "movement", "path_length", "limits", "trigger_rate", "warm_up", "bound", "budget"):
        source = (PACKAGE / f"{name}.py").read_text()
        assert "import torch" not in source
        assert "from torch" not in source


def test_files_are_short() -> None:
    """About 300 lines at most; what is longer is one thing that reads better whole."""
    long = {name_of(file): len(file.read_text().splitlines()) for file in FILES}
    assert not {name: lines for name, lines in long.items() if lines > 400}


def test_old_names_go_on_working() -> None:
    """What stood in the package's face, and the dotted names of its files that are folders now."""
    from step_optim import AdaptiveKL, Audit, EMAReference, FunctionKL, Limits, Point, Verdict, integrity
    from step_optim.audit import KLClosure
    from step_optim.controllers import Gate
    from step_optim.objective import AdaptiveKL as moved
    from step_optim.snapshot import Weights
    from step_optim.telemetry import read_log

    assert AdaptiveKL is moved
    assert all((Audit, EMAReference, FunctionKL, Limits, Point, Verdict, KLClosure, Gate, Weights, read_log))
    assert integrity.check({}).ok
    with pytest.raises(AttributeError, match="no attribute 'AdamW'"):
        step_optim.AdamW  # noqa: B018
