"""Where a measured number comes from: device, date, commit, versions; and a file that lines are added to."""

import datetime
import importlib.metadata
import json
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "jax-linear-attention", "tokamax",
    "flash-linear-attention", "torch", "triton")  # fmt: skip

Save = Callable[[dict[str, Any]], dict[str, Any]]  # add a line to the file, and return it with the facts of the run


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def commit() -> str:
    """Of this checkout, as git says it; "unknown" outside one."""
    git = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent)]  # `describe --dirty` writes .git/index
    asked = lambda *rest: subprocess.run([*git, *rest], capture_output=True, text=True, check=True).stdout.strip()
    try:
        changed = asked("status", "--porcelain", "--untracked-files=no")
        return asked("describe", "--always", "--abbrev=12") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Of the packages; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def in_words(found: dict[str, str | None]) -> str:
    """The versions of what is installed, in one line."""
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def of_code(known_commit: str | None, versions: dict[str, str | None]) -> dict[str, Any]:
    """Date, commit and versions of a run. known_commit: None asks git."""
    return {"date": now(), "commit": known_commit or commit(), "versions": versions}


def facts(known_commit: str | None) -> dict[str, Any]:
    """Where a number measured here comes from: device, date, commit, versions."""
    device = jax.devices()[0]
    return dict(device=device.device_kind, platform=device.platform) | of_code(known_commit, versions(PACKAGES))


def heading(about: dict[str, Any]) -> str:
    """Device, date, commit and jax of `facts`, in one line."""
    return f"{about['device']}, {about['date']}, commit {about['commit']}, jax {about['versions']['jax']}"


def saver(path: Path | None, about: dict[str, Any]) -> Save:
    """A function that adds a line to the file, if there is one, and returns it with `about`."""

    def save(line: dict[str, Any]) -> dict[str, Any]:
        line = line | about
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        return line

    return save
