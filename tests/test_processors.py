"""`make test-processors` runs what the processor has, and says what came of it."""

from __future__ import annotations

import pytest

from tests import processors


@pytest.mark.parametrize(
    ("best", "runs"),
    [("avx512", ["default", "avx2", "avx512"]), ("avx2", ["default", "avx2"]), ("neon", ["default"])],
)
def test_a_processor_has_what_is_below_its_best(best, runs) -> None:
    """Of a kind that is not listed, it has the default."""
    assert [capability for capability in processors.CAPABILITIES if processors.has(best, capability)] == runs


@pytest.mark.parametrize(("outcome", "passed"), [("assert True", True), ("assert not 'so'", False)])
def test_a_run_is_one_line_and_its_failures(tmp_path, capfd, outcome, passed) -> None:
    """The capability, the threads and the seed that are needed to run it again; then pytest's last line."""
    file = tmp_path / "test_one.py"
    file.write_text(f"def test_it():\n    {outcome}\n")
    assert processors.run("default", 1, 7, ["-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(file)]) is passed
    first, *rest = capfd.readouterr().out.splitlines()
    assert first.startswith(f"default, threads 1, seed 7: 1 {'passed' if passed else 'failed'} in")
    assert len(rest) == (not passed)
    assert all(line.startswith("FAILED") and "test_one.py::test_it" in line for line in rest)


def test_a_run_is_told_its_capability_threads_and_order(monkeypatch) -> None:
    """By variables that processes started by a test inherit; CI's fixed examples are not wanted."""
    monkeypatch.setenv("CI", "1")
    found = processors.environment("avx2", 2, 5)
    expected = {
        "ATEN_CPU_CAPABILITY": "avx2",
        "OMP_NUM_THREADS": "2",
        "STEP_OPTIM_TEST_THREADS": "2",
        "STEP_OPTIM_TEST_ORDER": "5",
    }
    assert expected.items() <= found.items()
    other = processors.environment("default", 2, 5)
    assert found["TORCHINDUCTOR_CACHE_DIR"] != other["TORCHINDUCTOR_CACHE_DIR"]
    assert "CI" not in found
