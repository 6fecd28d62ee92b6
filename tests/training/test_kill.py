"""A training run killed twenty times ends bit for bit like one that nobody touched."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import training_child

NUM_KILLS = 20
IN_CHECKPOINT = {4: 10_000, 11: 60_000, 16: 0}  # kills inside a checkpoint's write, and the bytes written by then
AT_START = {2, 9}  # kills within the first seconds: importing, restoring, compiling
SETTINGS = {"steps": 240, "checkpoint_every": 10, "evaluate_every": 7}


def start(folder: Path, scratch: Path, *fatal: int) -> subprocess.Popen:
    command = [sys.executable, training_child.__file__, str(folder), str(scratch), "2", json.dumps(SETTINGS)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    log = open(folder.with_suffix(".log"), "a")  # noqa: SIM115 (the child holds it)
    with log:
        return subprocess.Popen([*command, *map(str, fatal)], env=environment, stdout=log, stderr=log)


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step_*.npz"))


def newest_step(folder: Path) -> int:
    return int(checkpoints(folder)[-1].name[5:13]) if checkpoints(folder) else 0


def num_rows(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def rows(folder: Path) -> list[dict]:
    """The whole rows of metrics.jsonl, without `seconds`."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in whole]


def wait_for_rows(child: subprocess.Popen, folder: Path, past_rows: int, more: int, seconds: float = 100) -> None:
    """Until the resumed run, whose metrics hold `past_rows` once it has cut them, has written `more`; or so long."""
    cut, began = past_rows == num_rows(folder), time.monotonic()
    while child.poll() is None and time.monotonic() < began + seconds:
        count = num_rows(folder)
        cut = cut or count == past_rows
        if cut and count >= past_rows + more:
            return
        time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_twenty_kills_change_nothing(tmp_path: Path):
    whole, killed, draw = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    child = start(whole, tmp_path / "scratch")
    assert child.wait(timeout=120) == 0, (tmp_path / "whole.log").read_text()

    began = time.monotonic()
    for kill in range(NUM_KILLS):
        resumed = newest_step(killed)
        if kill in IN_CHECKPOINT:
            fatal_step, moment = resumed + 20, f"after {IN_CHECKPOINT[kill]:,} bytes of the second checkpoint"
            child = start(killed, tmp_path / "scratch", fatal_step, IN_CHECKPOINT[kill])
            child.wait(timeout=120)
        else:
            child = start(killed, tmp_path / "scratch")
            past_rows = sum(row["step"] <= resumed for row in rows(killed))
            if kill in AT_START:
                delay = draw.uniform(0, 4)
                moment = f"after {delay:.3f} s, or at its first row"
                wait_for_rows(child, killed, past_rows, 1, seconds=delay)
            else:
                more, delay = draw.randint(1, 20), draw.uniform(0, 0.03)
                moment = f"{delay:.3f} s after {more} rows"
                wait_for_rows(child, killed, past_rows, more)
                time.sleep(delay)
            child.kill()
            child.wait()
        last, temporary = (
            newest_step(killed),
            [path.stat().st_size for path in killed.glob("checkpoints/.unfinished-*")],
        )
        print(f"kill {kill + 1}: resumed {resumed}, killed {moment}; newest checkpoint {last}, unfinished {temporary}")
        assert child.returncode == -signal.SIGKILL, (tmp_path / "killed.log").read_text()
        if kill in IN_CHECKPOINT:
            assert temporary == [IN_CHECKPOINT[kill]]
            assert last == resumed + 10 > 0
    print(
        f"{NUM_KILLS} kills in {time.monotonic() - began:.0f} s, at step {newest_step(killed)} of {SETTINGS['steps']}"
    )
    assert newest_step(killed) < SETTINGS["steps"], "the run ended before its last kill: give it more steps"

    child = start(killed, tmp_path / "scratch")
    assert child.wait(timeout=120) == 0, (tmp_path / "killed.log").read_text()
    assert rows(killed) == rows(whole)
    assert rows(whole)[-1]["step"] == SETTINGS["steps"]
    last, expected = checkpoints(killed)[-1], checkpoints(whole)[-1]
    assert last.name == expected.name
    assert last.read_bytes() == expected.read_bytes()  # parameters, optimiser state and the place in the data
    assert list(killed.glob("**/.unfinished-*")) == []
