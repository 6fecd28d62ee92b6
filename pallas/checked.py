"""The decorator under which annotations are checked: shapes and dtypes by jaxtyping, types by beartype."""

import functools
import inspect
import re
import textwrap
from typing import Any, TypeVar

import numpy as np
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

T = TypeVar("T")


def checked(item: T) -> T:
    """A function, or a dataclass's constructor, that holds arguments and result to their annotations.

    NumPy's numbers are handed on as Python's: np.int64(4) as 4, np.float32(0.5) as 0.5.

    Raises:
      jaxtyping.TypeCheckError: in one line that names function, parameter, value, type, and the axes bound so far.
    """
    given: Any = item
    typed: Any = jaxtyped(given, typechecker=beartype)
    if not inspect.isclass(given):
        return _told(typed)
    typed.__init__ = _told(typed.__init__)
    return typed


def _told(function: Any) -> Any:
    @functools.wraps(function)
    def told(*args, **kwargs):
        __tracebackhide__ = True
        try:
            return function(*map(_plain, args), **{name: _plain(x) for name, x in kwargs.items()})
        except TypeCheckError as error:
            if "\n" not in str(error):  # told already, by a function within
                raise
            raise TypeCheckError(_in_one_line(str(error))) from None

    return told


def _plain(x: Any) -> Any:
    return x.item() if isinstance(x, np.integer | np.floating | np.bool_) else x


def _in_one_line(message: str) -> str:
    """What jaxtyping says, without all the other arguments, which may be whole models, and their annotations."""
    found, _, rest = re.sub(r"<class '(.*)'>", r"\1", message).partition("\n-----")
    axes = re.findall(r"^\*?\w+=.*$", rest.partition("axis annotation are as follows.\n")[2], re.MULTILINE)
    parts = re.split(r"\n(?=The problem arose|Actual value: |Expected type: )", found)
    parts = [textwrap.shorten(part.rstrip("."), 200, placeholder=" ...") for part in parts]
    return ". ".join(parts) + (f", where {', '.join(axes)}" if axes else "")
