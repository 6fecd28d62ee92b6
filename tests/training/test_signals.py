"""`rattn pretrain`, `ablate` and `convert`, ended by a signal in any phase, go on exactly and leave nothing behind.

The moments are spread evenly over the time that the whole command takes, from its first import to its plot.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_model import CONFIG, drawn

from rattn_eqx.data.tokenizers import BYTE_VOCABULARY, ByteTokenizer
from rattn_eqx.weights import own

ROOT = Path(__file__).parents[2]
NUM_SIGNALS = {"pretrain": 80, "ablate": 20, "convert": 20}
COMMANDS = {
    "pretrain": "--corpus data/sample --context 32 --window 8 --pattern local --steps 24 --checkpoint-every 4 "
    "--evaluate-every 5 --evaluation-tokens 256 --sample-tokens 8 --devices 1 --seed 5 "
    "--tokenizer bpe --vocabulary 300",
    "ablate": "--corpus data/sample --grid quick --seeds 2 --set training.steps=40 --set training.warmup_steps=4 "
    "--set training.context=32 --set task_share=0.5 --set training.evaluation_tokens=256 --set test_samples=4 "
    "--set test_lengths=32 --set task_options.gap=4",
    "convert": "--corpus data/sample --context 32 --window 6 --pattern local,global --transfer-steps 400 --steps 90 "
    "--checkpoint-every 3 --evaluation-tokens 256 --texts 2 --text-length 100 --distillation 0.5 --window-dropout 0.5 "
    "--seed 5",
}
OLD = dataclasses.replace(  # of which the command `convert` makes another
    CONFIG, vocabulary_size=BYTE_VOCABULARY, window=0, residual=False, pattern=("global_rope",), qk_norm=False
)
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
from rattn_eqx.__main__ import main
sys.exit(main())
"""
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


def arguments_of(command: str, folder: Path) -> list[str]:
    """The command's arguments, and in the folder the model that it converts."""
    if command != "convert":
        return [command, *COMMANDS[command].split()]
    own.save(drawn(OLD, size=0.4), folder / "old", tokenizer=ByteTokenizer())
    return [command, str(folder / "old"), *COMMANDS[command].split()]


def start(arguments: list[str], folder: Path, compiled: Path | None) -> subprocess.Popen:
    out = folder / ("run.jsonl" if arguments[0] == "ablate" else "run")
    arguments = [*arguments, "--out", str(out), "--cache", str(folder / "cache")]
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
    """All that a command left, without its times and locks, and without the commit, which may come meanwhile."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            apart = {"seconds", "training_seconds", "date", "commit"}
            found[name] = [{k: v for k, v in row.items() if k not in apart} for row in rows]
        elif path.name == "results.json":
            found[name] = re.sub(rb'"(date|commit)": "[^"]*"', b"", path.read_bytes())
        elif path.is_file() and path.name != ".lock":
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module", params=list(COMMANDS))
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """The arguments, what they leave when nobody stops them, the seconds, and the folder of compiled programs."""
    folder = tmp_path_factory.mktemp("whole")
    arguments, seconds = arguments_of(request.param, folder), []
    for compiled in (None, folder / "compiled"):
        began = time.monotonic()
        child = start(arguments, folder / f"{bool(compiled)}", compiled)
        _, said = child.communicate(timeout=300)
        assert child.returncode == 0, said
        seconds.append(time.monotonic() - began)
    assert left(folder / "True") == left(folder / "False")
    return arguments, left(folder / "True"), seconds[0], folder / "compiled"


def check(case: int, number: int, folder: Path, whole) -> None:
    arguments, expected, seconds, compiled = whole
    sent = (signal.SIGINT, signal.SIGKILL, signal.SIGTERM)[case % 3]
    moment = (case + 0.5) / number * seconds
    child = start(arguments, folder, None)
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
    print(f"{arguments[0]}: {sent.name} after {moment:.2f} of {seconds:.2f} s: {child.returncode}")
    child = start(arguments, folder, compiled)
    _, said = child.communicate(timeout=300)
    assert child.returncode == 0, said
    now = left(folder)
    assert now.keys() == expected.keys(), "something was left behind, or is missing"
    different = [name for name in now if now[name] != expected[name]]
    assert not different, f"{different} after {sent.name} at {moment:.2f} s"


@pytest.mark.slow
def test_two_signals_change_nothing(tmp_path):
    compiled, began = tmp_path / "compiled", time.monotonic()
    arguments = arguments_of("pretrain", tmp_path)
    child = start(arguments, tmp_path / "whole", compiled)
    _, said = child.communicate(timeout=300)
    assert child.returncode == 0, said
    whole = arguments, left(tmp_path / "whole"), time.monotonic() - began, compiled
    for case in (0, 2):
        check(case, 3, tmp_path / str(case), whole)


@pytest.mark.long
@pytest.mark.parametrize("case", range(max(NUM_SIGNALS.values())))
def test_signals_in_every_phase_change_nothing(tmp_path, whole, case: int):
    number = NUM_SIGNALS[whole[0][0]]
    if case < number:
        check(case, number, tmp_path, whole)


@pytest.mark.long
@pytest.mark.parametrize("megabytes", [1, 2, 3, 4, 6, 8])
def test_a_full_disk_is_said_and_the_next_run_goes_on(tmp_path, whole, megabytes: int):
    arguments, expected, _, compiled = whole
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}M", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        child = start(arguments, disk, compiled)
        _, said = child.communicate(timeout=300)
        assert child.returncode in (0, 2), said
        assert "Traceback" not in said
        assert child.returncode == 0 or "No space left on device" in said
        print(f"{arguments[0]} on {megabytes} MiB: {child.returncode} {said.splitlines()[-1:]}")
        subprocess.run(["mount", "-o", "remount,size=1G", str(disk)], check=True)
        child = start(arguments, disk, compiled)
        _, said = child.communicate(timeout=300)
        assert child.returncode == 0, said
        assert left(disk) == expected
    finally:
        subprocess.run(["umount", str(disk)], check=True)
