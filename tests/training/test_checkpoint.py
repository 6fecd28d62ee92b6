"""Checkpoints come back bit for bit, and a damaged, foreign or half-written one is never loaded."""

import errno
import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rattn_eqx.training.checkpoint import CheckpointError, load_checkpoint, restore_latest, save_checkpoint

# NaNs with payloads (quiet, signalling, negative), both zeros, an infinity and a subnormal.
FLOAT32_BITS = np.array([0x7FC12345, 0x7FA00001, 0xFFC54321, 0x80000000, 0, 0xFF800000, 1, 0x3F800001], np.uint32)
BFLOAT16_BITS = np.array([0x7FC1, 0x7F81, 0xFFD4, 0x8000, 0, 0xFF80, 1, 0x3F81], np.uint16)


class Layer(eqx.Module):
    weight: jax.Array
    activation: Callable
    name: str
    width: int = eqx.field(static=True)


def bits(tree) -> list[tuple]:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array))]
    return [(leaf.dtype, leaf.shape, leaf.tobytes()) for leaf in leaves]


def small_state(value: float) -> dict:
    return {
        "weight": jnp.full((3, 4), value, jnp.float32),
        "steps": jnp.asarray(7, jnp.int32),
        "half": jnp.ones(5, jnp.bfloat16),
    }


def content_named(path: Path, step: int) -> Path:
    """Gives a hand-made file the name that its bytes call for."""
    return path.rename(path.with_name(f"step_{step:08d}.{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.npz"))


@pytest.fixture
def two_saved(tmp_path: Path) -> tuple[Path, Path]:
    """Checkpoints of steps 10 and 20, of which tests damage the second."""
    return tuple(save_checkpoint(tmp_path, step, small_state(step), {"seen": step}) for step in (10, 20))  # pyright: ignore


def assert_falls_back(folder: Path, first: Path, refused: Path) -> None:
    said: list[str] = []
    restored = restore_latest(folder, small_state(0.0), report=said.append)
    assert restored is not None
    tree, metadata, path = restored
    assert (path, metadata, bits(tree)) == (first, {"seen": 10}, bits(small_state(10.0)))
    assert len(said) == 1
    assert said[0].startswith(f"checkpoint {refused} refused: ")
    assert said[0].endswith("; trying the one before it")


def test_a_training_state_comes_back_bit_for_bit(tmp_path: Path):
    layer = Layer(jnp.asarray(FLOAT32_BITS.view(np.float32)), jax.nn.gelu, "first", width=8)
    tree = {
        "model": (layer, eqx.nn.Linear(2, 3, key=jax.random.key(0))),
        "optimiser": optax.adamw(1e-3).init(eqx.filter(layer, eqx.is_array)),
        "bfloat16": jnp.asarray(BFLOAT16_BITS.view(jnp.bfloat16)).reshape(2, 4),
        "float8": jnp.asarray([1.5, -0.0], jnp.float8_e4m3fn),
        "int4": jnp.asarray([-8, 7], jnp.int4),
        "int32": jnp.asarray([-(2**31), 2**31 - 1], jnp.int32),
        "bool, scalar, empty": [jnp.asarray([True, False]), jnp.asarray(-0.0), jnp.zeros((0, 3))],
        "a/b.c é": np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)),
        "numpy scalar": np.float32(0.1),
        "none": None,
    }
    metadata = {"data": {"position": [3, 2**60]}, "loss": 0.1, "text": "é"}
    path = save_checkpoint(tmp_path, 1000, tree, metadata)

    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype) if hasattr(leaf, "shape") else leaf, tree)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "shape") else leaf, tree
    )
    for like in (zeros, abstract):
        loaded, loaded_metadata = load_checkpoint(path, like)
        assert bits(loaded) == bits(tree)
        assert jax.tree.structure(loaded) == jax.tree.structure(tree)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(eqx.filter(loaded, eqx.is_array)))
        assert loaded["model"][0].activation is jax.nn.gelu
        assert (loaded["model"][0].name, loaded["model"][0].width) == ("first", 8)
        assert loaded_metadata == metadata
    assert FLOAT32_BITS.tobytes() in path.read_bytes()


def test_leaves_that_are_not_arrays_come_from_like(tmp_path: Path):
    path = save_checkpoint(tmp_path, 1, Layer(jnp.ones(3), jax.nn.gelu, "saved", width=1), {})
    loaded, _ = load_checkpoint(path, Layer(jnp.zeros(3), jax.nn.relu, "like", width=2))
    assert (loaded.activation, loaded.name, loaded.width) == (jax.nn.relu, "like", 2)
    np.testing.assert_array_equal(loaded.weight, jnp.ones(3))


def test_a_lone_array_and_float64_under_x64(tmp_path: Path):
    assert bits(load_checkpoint(save_checkpoint(tmp_path, 1, jnp.arange(3), {}), jnp.zeros(3, jnp.int32))[0]) == bits(
        jnp.arange(3)
    )
    with jax.enable_x64(True):
        third = jnp.asarray(1 / 3, jnp.float64)
        path = save_checkpoint(tmp_path, 2, [third], {})
        like = [jax.ShapeDtypeStruct((), jnp.float64)]
        assert bits(load_checkpoint(path, like)[0]) == bits([third])
    with pytest.raises(ValueError, match=r"leaf \[0\] has dtype float64.*convert it or enable jax_enable_x64"):
        load_checkpoint(path, like)


def test_every_truncation_and_flipped_byte_is_refused(tmp_path: Path, two_saved: tuple[Path, Path]):
    first, second = two_saved
    whole = second.read_bytes()
    damaged = [whole[:length] for length in (0, 1, 30, len(whole) // 2, len(whole) - 22, len(whole) - 1)]
    damaged.append(whole + b"\0")
    for offset in range(0, len(whole), 23):
        damaged.append(whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :])
    for content in damaged:
        second.write_bytes(content)
        with pytest.raises(CheckpointError) as refusal:
            load_checkpoint(second, small_state(0.0))
        assert str(refusal.value).startswith(f"checkpoint {second} refused: its bytes have SHA-256 ")
    assert_falls_back(tmp_path, first, second)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("step_00000030.{digest}.npz", "it holds step 20, not the 30 of its name"),
        ("step_00000020.0123456789abcdef.npz", "not the 0123456789abcdef... of its name"),
        ("step_00000020.{digest} (1).npz", "it is not named step_"),
    ],
)
def test_a_renamed_file_is_refused(tmp_path: Path, two_saved: tuple[Path, Path], name: str, reason: str):
    first, second = two_saved
    renamed = second.rename(tmp_path / name.format(digest=second.name.split(".")[1]))
    with pytest.raises(CheckpointError) as refusal:
        load_checkpoint(renamed, small_state(0.0))
    assert str(renamed) in str(refusal.value)
    assert reason in str(refusal.value)
    if name.endswith("(1).npz"):  # no step to sort by: tried last
        first.write_bytes(b"")
        with pytest.raises(CheckpointError, match="it is not named step_"):
            restore_latest(tmp_path, small_state(0.0), report=lambda _: None)
    else:
        assert_falls_back(tmp_path, first, renamed)


def test_no_checkpoint_is_none_and_only_damaged_ones_an_error(tmp_path: Path, two_saved: tuple[Path, Path]):
    assert restore_latest(tmp_path / "missing", small_state(0.0)) is None
    for path in two_saved:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="no usable checkpoint in") as error:
        restore_latest(tmp_path, small_state(0.0), report=lambda _: None)
    assert all(str(path) in str(error.value) for path in two_saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": jnp.zeros((4, 4))}, "leaf ['weight'] is float32(3, 4) in the checkpoint and float32(4, 4) in"),
        ({"half": jnp.zeros(5, jnp.uint16)}, "leaf ['half'] is bfloat16(5,) in the checkpoint and uint16(5,) in"),
        ({"more": jnp.zeros(2)}, "leaf ['more'] is absent in the checkpoint and float32(2,) in"),
        ({"steps": None}, "leaf ['steps'] is int32() in the checkpoint and absent in"),
    ],
)
def test_another_configuration_is_an_error_not_a_fallback(
    tmp_path: Path, two_saved: tuple[Path, Path], change: dict, message: str
):
    with pytest.raises(CheckpointError) as refusal:
        restore_latest(tmp_path, small_state(0.0) | change)
    assert str(refusal.value).startswith(f"checkpoint {two_saved[1]} does not fit: {message}")


class FullDisk(io.FileIO):
    """A file on a disk with 1,000 bytes left."""

    def write(self, data) -> int:
        if self.tell() + len(data) > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.parametrize("fails", ["write", "fsync"])
def test_a_full_disk_leaves_the_last_checkpoints_and_nothing_else(
    tmp_path: Path, two_saved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, fails: str
):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    really_open = Path.open
    with monkeypatch.context() as patch:
        if fails == "fsync":
            patch.setattr(os, "fsync", full)
        else:
            opener = lambda self, mode: io.BufferedWriter(FullDisk(self, mode), 100)
            patch.setattr(Path, "open", lambda self, mode: (opener if mode == "xb" else really_open)(self, mode))
        with pytest.raises(OSError, match=r"step 30 could not be saved: No space left on device; free some") as error:
            save_checkpoint(tmp_path, 30, small_state(30.0), {})
    assert error.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(error.value)
    assert sorted(tmp_path.iterdir()) == sorted(two_saved)
    restored = restore_latest(tmp_path, small_state(0.0))
    assert restored is not None
    assert restored[1:] == ({"seen": 20}, two_saved[1])
    save_checkpoint(tmp_path, 30, small_state(30.0), {})


KILLED_RUNS = """
import os, resource, signal, sys
from pathlib import Path
import numpy as np
from rattn_eqx.training.checkpoint import save_checkpoint

tree = lambda value: {"weight": np.full(100_000, value, np.float32)}

def save_and_die(folder, moment):
    save_checkpoint(folder, 1, tree(1), {})
    if moment == "write":  # the kernel ends the process half-way through the file
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    calls = []
    def fsync(descriptor):
        calls.append(descriptor)
        if moment == f"fsync {len(calls)}":
            os.kill(os.getpid(), signal.SIGKILL)
    os.fsync = fsync
    save_checkpoint(folder, 2, tree(2), {})

for moment in sys.argv[2:]:
    if (child := os.fork()) == 0:
        try:
            save_and_die(Path(sys.argv[1]) / moment, moment)
        finally:
            os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_run_killed_while_saving_loses_nothing(tmp_path: Path):
    # The first fsync is of the complete temporary file, the second of the folder after the renaming.
    moments = {"write": (1, signal.SIGXFSZ), "fsync 1": (1, signal.SIGKILL), "fsync 2": (2, signal.SIGKILL)}
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", KILLED_RUNS, str(tmp_path), *moments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert [-int(code) for code in run.stdout.split()] == [ended_by for _, ended_by in moments.values()], run.stderr
    like = {"weight": jax.ShapeDtypeStruct((100_000,), jnp.float32)}
    for moment, (step, _) in moments.items():
        folder = tmp_path / moment
        assert len(list(folder.glob(".unfinished-*"))) == (0 if step == 2 else 1), moment
        restored = restore_latest(folder, like, report=pytest.fail)
        assert restored is not None
        np.testing.assert_array_equal(restored[0]["weight"], np.full(100_000, step, np.float32), err_msg=moment)
        kept = save_checkpoint(folder, 3, restored[0], {}, keep=1)
        assert list(folder.iterdir()) == [kept], moment


class Planted:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("where", ["leaf", "file"])
def test_a_planted_pickle_is_refused_and_not_run(tmp_path: Path, two_saved: tuple[Path, Path], where: str):
    marker, planted = tmp_path / "marker", tmp_path / "planted.npz"
    if where == "leaf":
        document = json.dumps({"step": 30, "views": {}, "metadata": {}}).encode()
        entries = {"['weight']": np.array(Planted(marker), object), "metadata": np.frombuffer(document, np.uint8)}
        np.savez(planted, **entries)  # pyright: ignore[reportArgumentType]
        np.load(planted, allow_pickle=True)["['weight']"]
    else:
        planted.write_bytes(pickle.dumps(Planted(marker)))
        np.load(planted, allow_pickle=True)
    assert marker.exists(), "the pickle must be a live one"
    marker.unlink()
    two_saved[1].unlink()
    planted = content_named(planted, 30)
    with pytest.raises(CheckpointError, match=r"no header of an array of numbers|it is not an npz archive"):
        load_checkpoint(planted, small_state(0.0))
    assert_falls_back(tmp_path, two_saved[0], planted)
    assert not marker.exists()


def test_the_newest_sound_checkpoints_are_kept(tmp_path: Path):
    save = lambda step, value=0.0, keep=2: save_checkpoint(tmp_path, step, small_state(value), {}, keep=keep)
    present = lambda: {path for path in tmp_path.iterdir()}
    (tmp_path / ".unfinished-0123").write_bytes(b"left by a killed run")
    (tmp_path / "notes.txt").touch()
    first, second, third = save(1), save(2), save(3, keep=3)
    assert present() == {first, second, third, tmp_path / "notes.txt"}
    third.write_bytes(b"")
    fourth = save(4)
    assert present() == {second, fourth, tmp_path / "notes.txt"}, "a damaged one took the place of a sound one"
    assert save(4) == fourth, "the same content has the same name"
    again = save(4, value=1.0)
    assert present() == {second, again, tmp_path / "notes.txt"}
    earlier = save(3, keep=1)
    assert present() == {earlier, again, tmp_path / "notes.txt"}, "a later step was removed, or the one just saved"


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (jax.random.key(0), r"leaf \['x'\] is a typed key .*store jax.random.key_data"),
        (np.array(["text", None], object), r"leaf \['x'\] has dtype object"),
        (np.array(["text"]), r"leaf \['x'\] has dtype <U4"),
        (np.arange(3.0), r"leaf \['x'\] has dtype float64, which jax would narrow"),
    ],
)
def test_a_leaf_that_would_not_come_back_is_refused(tmp_path: Path, leaf, message: str):
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path / "runs", 1, {"x": leaf}, {})
    assert not (tmp_path / "runs").exists()


def test_bad_arguments_are_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises(ValueError, match="keep at least 1; got step=1, keep=0"):
        save_checkpoint(tmp_path, 1, small_state(0.0), {}, keep=0)
    with pytest.raises(ValueError, match="step must be at least 0"):
        save_checkpoint(tmp_path, -1, small_state(0.0), {})
    with pytest.raises(ValueError, match="metadata must be plain JSON values"):
        save_checkpoint(tmp_path, 1, small_state(0.0), {"path": tmp_path})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["FIFO", "link to a device", "dangling link", "folder", "sparse", "link to itself"])
def test_what_is_no_checkpoint_file_is_passed_over_and_named(tmp_path: Path, two_saved, kind: str):
    planted = tmp_path / "step_00000099.0123456789abcdef.npz"
    match kind:
        case "FIFO":
            os.mkfifo(planted)
        case "link to a device":
            planted.symlink_to("/dev/zero")
        case "dangling link":
            planted.symlink_to(tmp_path / "nothing")
        case "link to itself":
            planted.symlink_to(planted)
        case "folder":
            planted.mkdir()
        case "sparse":
            with planted.open("wb") as file:
                file.truncate(2**40)
    said: list[str] = []
    restored = restore_latest(tmp_path, small_state(0.0), report=said.append)
    assert restored is not None
    assert restored[1:] == ({"seen": 20}, two_saved[1])
    assert [str(planted) in line for line in said] == [True]
    save_checkpoint(tmp_path, 100, small_state(100.0), {})
    assert os.path.lexists(planted) == (kind != "sparse"), "what is no file is left alone, a damaged checkpoint is not"


def test_a_folder_in_the_place_of_the_step_taken_again_is_put_aside(tmp_path: Path, two_saved):
    two_saved[1].unlink()
    two_saved[1].mkdir()
    (two_saved[1] / "theirs").touch()
    assert save_checkpoint(tmp_path, 20, small_state(20), {"seen": 20}) == two_saved[1]
    assert [path.name for path in tmp_path.glob("unfinished-*/*")] == ["theirs"]


class Claims:
    """Hand-made archives whose names fit, by what is wrong with them."""

    @staticmethod
    def entry(header: bytes, data: bytes = b"") -> bytes:
        header = header.ljust(118) + b"\n"
        return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data

    @staticmethod
    def archive(path: Path, entries: dict[str, bytes], document: bytes) -> Path:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in entries.items():
                archive.writestr(name, content)
            stored = io.BytesIO()
            np.save(stored, np.frombuffer(document, np.uint8))
            archive.writestr("metadata.npy", stored.getvalue())
        return content_named(path, 30)


DOCUMENT = b'{"step": 30, "views": {}, "metadata": {}}'
FLOATS = b"{'descr': '<f4', 'fortran_order': False, 'shape': (%s,), }"


@pytest.mark.parametrize(
    ("entries", "document", "reason"),
    [
        ({"x.npy": Claims.entry(FLOATS % b"1000000000000", b"1234")}, DOCUMENT, "claims shape"),
        ({"x.npy": b"no array"}, DOCUMENT, "header"),
        ({"x.npy": Claims.entry(b"{'descr': [], 1: 2}")}, DOCUMENT, "header"),
        ({"x.npy": Claims.entry(b"(" * 100)}, DOCUMENT, "header"),
        (
            {"x.npy": Claims.entry((FLOATS % b"1").replace(b"<", b">"), b"1234")},
            DOCUMENT,
            "another order of bytes, >f4",
        ),
        ({}, b'{"step": 30, "views": {}, "metadata": {"step": 31}}', "its metadata is of step 31, not the 30"),
        ({}, b'{"step": 30, "views": null, "metadata": {}}', "must hold step, views and metadata"),
        ({}, b'{"step": 30, "views": {"x": "bfloat16"}, "metadata": {}}', "its views must name dtypes"),
        ({}, b'{"step": 30, "views": {}, "metadata": []}', "must hold step, views and metadata"),
        ({}, b"[" * 100_000, "its metadata must be JSON"),
        ({}, b"\xff", "invalid start byte"),
    ],
)
def test_a_false_claim_is_refused_before_memory_is_taken(tmp_path: Path, two_saved, entries, document, reason: str):
    two_saved[1].unlink()
    planted = Claims.archive(tmp_path / "planted", entries, document)
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(planted, small_state(0.0))
    assert_falls_back(tmp_path, two_saved[0], planted)


def test_a_long_name_is_not_told_whole(tmp_path: Path):
    document = np.frombuffer(DOCUMENT, np.uint8)
    np.savez(tmp_path / "long.npz", metadata=document, **{"x" * 60_000: np.zeros(3)})  # pyright: ignore
    with pytest.raises(CheckpointError, match="leaf xxx") as told:
        load_checkpoint(content_named(tmp_path / "long.npz", 30), {"x": jnp.zeros(3)})
    assert len(str(told.value)) < 1500


def test_a_checkpoint_with_an_obstacle_is_passed_over(tmp_path: Path, two_saved):
    said: list[str] = []
    strange = lambda metadata: "it is of another run" if metadata["seen"] == 20 else None
    restored = restore_latest(tmp_path, small_state(0.0), report=said.append, obstacle=strange)
    assert restored is not None
    assert restored[2] == two_saved[0]
    assert said == [f"checkpoint {two_saved[1]} refused: it is of another run; trying the one before it"]


def test_a_reader_never_fails_while_a_run_saves(tmp_path: Path):
    save_checkpoint(tmp_path, 1, small_state(1), {})
    stop = threading.Event()

    def save() -> None:
        for step in range(2, 10_000):
            save_checkpoint(tmp_path, step, small_state(step), {}, keep=1)
            if stop.is_set():
                return

    writer = threading.Thread(target=save)
    writer.start()
    try:
        for _ in range(300):
            restored = restore_latest(tmp_path, small_state(0), report=pytest.fail)
            assert restored is not None
    finally:
        stop.set()
        writer.join()
