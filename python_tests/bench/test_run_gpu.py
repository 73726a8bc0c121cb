"""bench/run_gpu.sh without a GPU: its stages with tools that only say what they were asked."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "run_gpu.sh"
STAGES = ["facts", "build", "tests", "memcheck", "racecheck", "goldens", "bench"]


def run(*arguments: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    found = os.environ["PATH"] if path is None else f"{path}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": found, **environment},
        timeout=60,
    )


@pytest.fixture
def tools(tmp_path) -> Path:
    """python3, nvcc, nvidia-smi and compute-sanitizer that write down their arguments and succeed.

    FAIL names a text: a call that holds it fails. SLEEP likewise never ends.
    """
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("python3", "nvcc", "nvidia-smi", "compute-sanitizer"):
        tool = folder / name
        tool.write_text(
            "#!/bin/bash\n"
            'echo "called: ${0##*/} $*"\n'
            'case "$*" in *"${SLEEP:-no such call}"*) sleep 30 ;; esac\n'
            'case "$*" in *"${FAIL:-no such call}"*) exit 3 ;; esac\n'
        )
        tool.chmod(0o755)
    return folder


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_dry_run_names_every_stage_and_touches_nothing(tmp_path):
    result = run("--dry-run", str(tmp_path / "out"))
    assert (result.returncode, result.stderr) == (0, "")
    limits = dict(re.findall(r"^(\w+): at most (\d+) s$", result.stdout, re.MULTILINE))
    assert list(limits) == STAGES
    assert sum(int(limits[s]) for s in STAGES[:-1]) + 90 < 570  # the bench keeps its share
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["--what", "x"], ["x", "y"], ["--stages"], ["--stages", "z", "x"]])
def test_wrong_usage_is_2(arguments):
    assert run(*arguments).returncode == 2


def test_all_stages_pass(tmp_path, tools):
    result = run(str(tmp_path / "out"), path=tools, MING_RT_COMMIT="abc")
    assert result.returncode == 0, result.stdout
    found = summary(tmp_path / "out")
    assert found["commit"] == "abc"
    assert list(found["stages"]) == STAGES
    assert {s["exit"] for s in found["stages"].values()} == {0}
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "called: python3 setup.py build_ext --inplace" in log
    assert "called: python3 -m pytest python_tests/ops -k cuda" in log
    assert "called: compute-sanitizer --tool racecheck" in log
    assert re.search(r"ming_rt.cli bench --device cuda --budget \d+ --out /", log)


def test_a_failing_stage_keeps_the_others_and_the_exit_status_tells(tmp_path, tools):
    result = run(str(tmp_path / "out"), path=tools, FAIL="python_tests/ops")
    assert result.returncode == 1
    exits = {name: s["exit"] for name, s in summary(tmp_path / "out")["stages"].items()}
    assert exits == {**dict.fromkeys(STAGES, 0), "tests": 3}
    assert "== tests: exit 3" in result.stdout


def test_a_stage_that_hangs_is_ended(tmp_path, tools):
    result = run(
        "--stages", "goldens,bench", str(tmp_path / "out"), path=tools, SLEEP="golden", SECONDS_TOTAL="122"
    )
    assert result.returncode == 1
    found = summary(tmp_path / "out")["stages"]
    assert (found["goldens"]["exit"], found["goldens"]["limit"]) == (124, 2)
    assert found["bench"]["exit"] == 0


def test_no_time_left_is_a_failure(tmp_path, tools):
    result = run("--stages", "tests", str(tmp_path / "out"), path=tools, SECONDS_TOTAL="10")
    assert result.returncode == 1
    assert summary(tmp_path / "out")["stages"]["tests"]["exit"] == 124
