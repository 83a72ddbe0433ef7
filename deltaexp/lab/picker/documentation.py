"""What is written under the fields of a config's dataclass."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap


def documentation(config_class: type) -> dict[str, str]:
    """Return what is written under the fields of a dataclass, its bases included."""
    found: dict[str, str] = {}
    for base in reversed(config_class.__mro__[:-1]):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        except (OSError, TypeError):  # made where there is no file, such as in a notebook
            continue
        for statement, after in itertools.pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found[ast.unparse(statement.target)] = inspect.cleandoc(str(after.value.value))
    return found
