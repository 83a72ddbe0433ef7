"""The table of faults in FAULTS.md names tests that exist, and every link in it is one."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROWS = [line for line in (TESTS / "FAULTS.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
ROWS = [row for row in ROWS if not row.startswith(("| fault |", "| --- |"))]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_every_row_names_tests_that_exist(row: str) -> None:
    last = row.rstrip("| ").split("|")[-1]
    names = re.findall(r"`(?:([\w/.]+\.py)::)?(test_\w+)`", last)
    assert names, "a row without a test"
    file = ""
    for path, name in names:
        file = path or file
        tree = ast.parse((TESTS.parent / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"
