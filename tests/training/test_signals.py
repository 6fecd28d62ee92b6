"""`rattn pretrain` and `rattn ablate`, ended by a signal in any phase, go on exactly and leave nothing behind.

The moments are spread evenly over the time that the whole command takes, from its first import to its plot.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NUM_SIGNALS = {"pretrain": 80, "ablate": 20}
COMMANDS = {
    "pretrain": "--corpus data/sample --context 32 --window 8 --pattern local --steps 24 --checkpoint-every 4 "
    "--evaluate-every 5 --evaluation-tokens 256 --sample-tokens 8 --devices 1 --seed 5 "
    "--tokenizer bpe --vocabulary 300",
    "ablate": "--corpus data/sample --grid quick --seeds 2 --set training.steps=40 --set training.warmup_steps=4 "
    "--set training.context=32 --set task_share=0.5 --set training.evaluation_tokens=256 --set test_samples=4 "
    "--set test_lengths=32 --set task_options.gap=4",
}
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
from rattn_eqx.__main__ import main
sys.exit(main())
"""
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


def start(command: str, folder: Path, compiled: Path | None) -> subprocess.Popen:
    out = folder / ("run" if command == "pretrain" else "run.jsonl")
    arguments = [command, *COMMANDS[command].split(), "--out", str(out), "--cache", str(folder / "cache")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if compiled:
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left(folder: Path) -> dict[str, object]:
    """All that a command left, without its times, dates and locks."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            found[name] = [
                {k: v for k, v in row.items() if k not in ("seconds", "training_seconds", "date")} for row in rows
            ]
        elif path.is_file() and path.name != ".lock":
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module", params=list(COMMANDS))
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """The command, what it leaves when nobody stops it, its seconds, and the folder of compiled programs."""
    folder = tmp_path_factory.mktemp("whole")
    seconds = []
    for compiled in (None, folder / "compiled"):
        began = time.monotonic()
        child = start(request.param, folder / f"{bool(compiled)}", compiled)
        _, said = child.communicate(timeout=300)
        assert child.returncode == 0, said
        seconds.append(time.monotonic() - began)
    assert left(folder / "True") == left(folder / "False")
    return request.param, left(folder / "True"), seconds[0], folder / "compiled"


def check(case: int, number: int, folder: Path, whole) -> None:
    command, expected, seconds, compiled = whole
    sent = (signal.SIGINT, signal.SIGKILL, signal.SIGTERM)[case % 3]
    moment = (case + 0.5) / number * seconds
    child = start(command, folder, None)
    try:
        _, said = child.communicate(timeout=moment)
    except subprocess.TimeoutExpired:
        child.send_signal(sent)
        _, said = child.communicate(timeout=60)
        assert child.returncode in ((130, 0) if sent == signal.SIGINT else (-sent, 0)), said
        if child.returncode == 130:
            assert "rattn: stopped" in said
            by_jax = "ERROR:jax._src.xla_bridge" in said  # which swallows an interrupt while it loads CUDA, and logs it
            assert "Traceback" not in said or by_jax, said
    print(f"{command}: {sent.name} after {moment:.2f} of {seconds:.2f} s: {child.returncode}")
    child = start(command, folder, compiled)
    _, said = child.communicate(timeout=300)
    assert child.returncode == 0, said
    now = left(folder)
    assert now.keys() == expected.keys(), "something was left behind, or is missing"
    different = [name for name in now if now[name] != expected[name]]
    assert not different, f"{different} after {sent.name} at {moment:.2f} s"


@pytest.mark.slow
def test_two_signals_change_nothing(tmp_path):
    compiled, began = tmp_path / "compiled", time.monotonic()
    child = start("pretrain", tmp_path / "whole", compiled)
    _, said = child.communicate(timeout=300)
    assert child.returncode == 0, said
    whole = "pretrain", left(tmp_path / "whole"), time.monotonic() - began, compiled
    for case in (0, 2):
        check(case, 3, tmp_path / str(case), whole)


@pytest.mark.long
@pytest.mark.parametrize("case", range(max(NUM_SIGNALS.values())))
def test_a_hundred_signals_change_nothing(tmp_path, whole, case: int):
    if case < NUM_SIGNALS[whole[0]]:
        check(case, NUM_SIGNALS[whole[0]], tmp_path, whole)


@pytest.mark.long
@pytest.mark.parametrize("megabytes", [1, 2, 3, 4, 6, 8])
def test_a_full_disk_is_said_and_the_next_run_goes_on(tmp_path, whole, megabytes: int):
    command, expected, _, compiled = whole
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}M", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        child = start(command, disk, compiled)
        _, said = child.communicate(timeout=300)
        assert child.returncode in (0, 2), said
        assert "Traceback" not in said
        assert child.returncode == 0 or "No space left on device" in said
        print(f"{command} on {megabytes} MiB: {child.returncode} {said.splitlines()[-1:]}")
        subprocess.run(["mount", "-o", "remount,size=1G", str(disk)], check=True)
        child = start(command, disk, compiled)
        _, said = child.communicate(timeout=300)
        assert child.returncode == 0, said
        assert left(disk) == expected
    finally:
        subprocess.run(["umount", str(disk)], check=True)
