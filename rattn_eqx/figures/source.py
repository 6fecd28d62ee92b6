"""Source of this project in a notebook, folded: a heading that a click opens."""

import ast
import dataclasses
import inspect
import textwrap
from pathlib import Path
from types import ModuleType


@dataclasses.dataclass(frozen=True)
class Source:
    """Python source, and what a notebook shows while it is folded: its name and where it stands."""

    name: str
    place: str
    text: str

    def _repr_markdown_(self) -> str:
        heading = f"<summary><code>{self.name}</code>, {self.place}</summary>"
        return f"<details>{heading}\n\n```python\n{self.text}\n```\n\n</details>"

    def __repr__(self) -> str:
        return f"{self.name}, {self.place}"


def source(module: ModuleType, *path: str) -> Source:
    """The source of a function or class of a module, or, name by name, of what is defined inside it.

    Of several with one name the longest is taken. Raises ValueError where there is none.

    >>> visit = source(ast, "NodeVisitor", "visit")
    >>> visit.name, visit.text.splitlines()[0]
    ('NodeVisitor.visit', 'def visit(self, node):')
    """
    text = inspect.getsource(module)
    node = ast.parse(text)
    for name in path:
        found = [x for x in ast.walk(node) if isinstance(x, ast.FunctionDef | ast.ClassDef) and x.name == name]
        if not found:
            raise ValueError(f"source: {module.__name__} has no {' and in it no '.join(path)}; name what it defines")
        node = max(found, key=lambda x: (x.end_lineno or 0) - x.lineno)
    shown = textwrap.dedent(ast.get_source_segment(text, node, padded=True) or text) if path else text
    file = Path(inspect.getsourcefile(module) or module.__name__)
    lines = shown.rstrip().count("\n") + 1
    return Source(".".join(path) or file.stem, f"{lines} lines of {file.parent.name}/{file.name}", shown.rstrip())
