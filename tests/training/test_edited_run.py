"""A run folder that somebody edited gives the untouched run's numbers or one sentence: nothing else, and nothing late.

Each case copies a run, edits it at random, loads its model and trains on. What comes out is compared bit for bit.
"""

import contextlib
import functools
import json
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import training_child
from training_child import bits, curve

from rattn_eqx.training import loop

pytestmark = [
    pytest.mark.standard_dtype_promotion,  # optax
    pytest.mark.skipif(sys.platform == "win32", reason="POSIX files and alarms"),
]
SETTINGS = {"steps": 12, "checkpoint_every": 4, "evaluate_every": 5}
SECONDS = 10  # the longest that a command may take
ODD_VALUES = [None, True, -1, 0, 96.0, 2**70, 10**400, 1e308, "no", "", [], [1], {}, {"a": 1}, [[[[[]]]]], "�\ud800"]


def content(folder: Path) -> dict[str, object]:
    """Of everything below a folder, links not followed."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        found[str(path)] = os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
    return found


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    def late(*_) -> None:
        raise AssertionError(f"it took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory):
    """The run, what `train` takes for it, its curve, and the models that its two checkpoints hold."""
    folder = tmp_path_factory.mktemp("untouched")
    arguments = training_child.run_arguments(folder / "scratch", **SETTINGS)
    with pytest.MonkeyPatch.context() as patch:  # compile once: each call of `train` builds its step anew
        patch.setattr(loop, "make_step", functools.cache(loop.make_step))
        train = lambda run: loop.train(run, *arguments, report=lambda line: None, show_progress=False)
        model = train(folder / "run")
        newest = sorted((folder / "run" / "checkpoints").iterdir())[-1]
        older = shutil.copytree(folder / "run", folder / "older")
        (older / "checkpoints" / newest.name).unlink()
        models = [bits(model), bits(loop.load_model(older)[0])]
        yield folder / "run", train, curve(folder / "run"), models


def edit(draw: random.Random, run: Path, outside: Path) -> str:
    """Change something in a run folder; what was done, in words."""
    checkpoints = sorted((run / "checkpoints").glob("*")) if (run / "checkpoints").is_dir() else []
    files = [run / name for name in ("config.json", "tokenizer.json", "metrics.jsonl", ".lock", "checkpoints")]
    path = draw.choice([*files, *checkpoints, *checkpoints])
    kind = draw.choice(["damage", "damage", "json", "json", "replace", "replace", "plant", "plant", "rows"])
    if kind == "json":
        path = run / draw.choice(["config.json", "tokenizer.json"])
    if kind == "rows":
        path = run / "metrics.jsonl"
    if kind == "plant":
        digest = draw.choice(["0123456789abcdef", "x", checkpoints[-1].name[14:30] if checkpoints else ""])
        name = draw.choice(
            [f"step_{draw.choice([4, 8, 12, 99]):08d}.{digest}.npz", ".unfinished-0", "step_1.tmp", ".lock"]
        )
        path = draw.choice([run, run / "checkpoints"]) / name
    if kind in ("replace", "plant"):
        return put(draw, path, outside)
    if not path.is_file() or path.is_symlink():
        return "nothing"
    return {"damage": damage, "json": change_json, "rows": change_rows}[kind](draw, path)


def put(draw: random.Random, path: Path, outside: Path) -> str:
    what = draw.choice(["FIFO", "device", "dangling", "circle", "link", "linked folder", "folder", "sparse", "nothing"])
    if not path.parent.is_dir() or path.parent.is_symlink():
        return "nothing"
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    targets = {"device": Path("/dev/zero"), "dangling": outside / "none", "circle": path}
    targets |= {"link": outside / "file", "linked folder": outside / "folder"}
    if what in targets:
        path.symlink_to(targets[what])
    elif what == "FIFO":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
        (path / "theirs").touch()
    elif what == "sparse":
        with path.open("wb") as file:
            file.truncate(2**40)
    return f"{path.name} is now {what}"


def damage(draw: random.Random, path: Path) -> str:
    data = bytearray(path.read_bytes())
    if not data:
        return "nothing"
    at, what = draw.randrange(len(data)), draw.choice(["cut", "flip", "zeros", "more", "empty", "other"])
    if what == "cut":
        del data[at:]
    elif what == "flip":
        data[at] ^= 1 << draw.randrange(8)
    elif what == "zeros":
        data[at : at + 100] = bytes(len(data[at : at + 100]))
    elif what == "more":
        data += draw.randbytes(50)
    elif what == "empty":
        data.clear()
    else:
        data[:] = draw.randbytes(len(data))
    path.write_bytes(data)
    return f"{path.name}: {what} at {at}"


def change_json(draw: random.Random, path: Path) -> str:
    try:
        values = json.loads(path.read_bytes())
        owner = draw.choice([value for value in [values, *values.values()] if isinstance(value, dict)])
        name, value = draw.choice([*owner, "more"]), draw.choice([*ODD_VALUES, *owner.values()])
    except (ValueError, AttributeError, IndexError):  # edited before
        return "nothing"
    if draw.random() < 0.2:
        owner.pop(name, None)
        value = "gone"
    else:
        owner[name] = value
    path.write_text(json.dumps(values))
    return f"{path.name}: {name} is {str(value)[:40]!r}"


def change_rows(draw: random.Random, path: Path) -> str:
    lines = path.read_bytes().splitlines(keepends=True)
    if not lines:
        return "nothing"
    at, what = draw.randrange(len(lines)), draw.choice(["gone", "twice", "odd", "value"])
    if what == "gone":
        del lines[at]
    elif what == "twice":
        lines.insert(at, lines[at])
    elif what == "odd":
        lines[at] = draw.choice([b"[1]\n", b"{}\n", b"NaN\n", b'{"step": "1"}\n', b"[" * 50_000 + b"\n", b"\n"])
    else:
        lines[at] = lines[at].replace(b"1", b"2", 1)
    path.write_bytes(b"".join(lines))
    return f"{path.name}: row {at} {what}"


def one_case(seed: int, folder: Path, untouched) -> str:
    """What was edited, and what came of it."""
    source, train, whole, models = untouched
    draw = random.Random(seed)
    run, outside = folder / "run", folder / "outside"
    (outside / "folder").mkdir(parents=True)
    for name in ("file", "folder/theirs"):
        (outside / name).write_text("theirs")
    shutil.copytree(source, run)
    if draw.random() < 0.5:  # a run that was stopped
        sorted((run / "checkpoints").iterdir())[-1].unlink()
    edits = ", ".join(edit(draw, run, outside) for _ in range(draw.choice([1, 1, 1, 2, 3])))
    before = content(outside)

    def ends(work: Callable[[], list[bytes]], right: list[list[bytes]]) -> str:
        refusal = None
        with in_time():
            try:
                result = work()
            except (ValueError, OSError) as error:  # what main() says in one line
                refusal = error
        if refusal is not None:
            assert 0 < len(str(refusal)) < 2000, f"seed {seed} ({edits}): {refusal!r:.300}"
            return type(refusal).__name__
        assert result in right, f"seed {seed} ({edits}): other numbers than the untouched run's"
        return "right"

    loaded = ends(lambda: bits(loop.load_model(run, report=lambda line: None)[0]), models)
    trained = ends(lambda: bits(train(run)), models[:1])
    if trained == "right":
        assert curve(run) == whole, f"seed {seed} ({edits})"
    assert content(outside) == before, f"seed {seed} ({edits}): a file outside was touched"
    return f"{edits}: loaded {loaded}, trained {trained}"


def run_cases(seeds: range, folder: Path, untouched) -> None:
    before, ends = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {}
    for seed in seeds:
        case = folder / str(seed)
        end = one_case(seed, case, untouched).rpartition(": ")[2]
        ends[end] = ends.get(end, 0) + 1
        shutil.rmtree(case)
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{len(seeds)} edited runs, {more / 2**20:.2f} GiB more at most: {ends}")
    assert more < 2**20, "more than 1 GiB"


@pytest.mark.slow
def test_a_hundred_edited_runs(tmp_path, untouched):
    run_cases(range(100), tmp_path, untouched)


@pytest.mark.long
@pytest.mark.parametrize("hundred", range(1, 10))
def test_a_thousand_edited_runs(tmp_path, untouched, hundred: int):
    run_cases(range(100 * hundred, 100 * hundred + 100), tmp_path, untouched)
