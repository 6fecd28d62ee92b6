"""Files of installed packages, found without importing them."""

import importlib.metadata
import os
from pathlib import Path

PREFIX = "package:"  # before a package's name, where a path could stand


def package_files(what: str, name: str) -> list[tuple[str, Path]]:
    """The files that pip installed with a package, those that are still there: names with "/", and paths.

    Raises:
      ValueError: no such package, or one without files of its own; `what` begins the message.
    """
    try:
        distribution = importlib.metadata.distribution(name)
    except (importlib.metadata.PackageNotFoundError, ValueError) as error:
        raise ValueError(f"{what}: no package {name!r:.80} is installed; pip install it, or give a path") from error
    folder = Path(os.path.realpath(str(distribution.locate_file(""))))
    found = [(file.as_posix(), folder / file) for file in distribution.files or [] if ".." not in file.parts]
    if not (present := [(file, path) for file, path in found if path.is_file()]):
        raise ValueError(f"{what}: the package {name} must have files of its own; it has none here; give their path")
    return present


def the_file(what: str, path: str | os.PathLike, suffix: str) -> Path:
    """A path; of "package:NAME" that of its only file with a suffix.

    Raises:
      ValueError: as `package_files`, and for another number of such files.
    """
    if not os.fspath(path).startswith(PREFIX):
        return Path(path)
    name = os.fspath(path).removeprefix(PREFIX)
    found = [path for _, path in package_files(what, name) if path.suffix == suffix]
    if len(found) != 1:
        raise ValueError(f"{what}: the package {name} must have one {suffix} file; it has {len(found)}; give a path")
    return found[0]
