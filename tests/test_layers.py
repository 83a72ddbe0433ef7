"""The layers of the package stay acyclic, and each third-party library stays behind its fence."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "deltaexp"
ORDER = [
    {"redaction"},
    {"errors", "lazy"},
    {"addressing", "hubclient"},
    {"registry"},
    {"indices", "layout", "naming", "checksum", "mapped", "quantised"},
    {"tree", "digest_cache", "manifest", "probe"},
    {"structure", "attention", "prompting"},
    {"targets"},
    {"casting", "half_attention", "hooks", "norms_and_gelus", "ownership", "shared_input", "speed"},
    {"low_rank", "hadamard"},
    {"deltas"},
    {"full_size", "gathered"},
    {"fused"},
    {"checkpoint", "surgery"},
    {"frozen"},
    {"one_token"},
    {"verification", "card", "interop", "planning"},
    {"hub", "publishing", "searching", "folding"},
    {"merging"},
    {"model"},
    {"auto", "combining", "routing"},
    {"visualize"},
    {"lab"},
    {"commands"},
    {"plugins"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
SWEEPING = {f"lab/sweeping/{name}.py" for name in ("design", "grid", "search", "space", "sweep")}
SWEEPING |= {f"plugins/hydra_plugins/deltaexp_{name}.py" for name in ("launching", "search", "sweeping")}
FENCES = {
    "hydra": {"lab/schema.py", "lab/wording.py", *SWEEPING, "__main__.py"},
    "omegaconf": {"lab/schema.py", "lab/wording.py", *SWEEPING, "__main__.py"},
    "wandb": {"lab/tracking/wandb.py", "lab/tracking/wandb_file.py"},
    "tensorboard": {"lab/tracking/tensorboard.py"},
    "datasets": {
        *(path.relative_to(PACKAGE).as_posix() for path in (PACKAGE / "lab" / "tasks").rglob("*.py")),
        *("lab/predicting.py", "lab/predictions.py", "lab/processes.py"),
    },
}
FILES = sorted(path for path in PACKAGE.rglob("*.py"))


def imports(path: Path, everywhere: bool) -> set[str]:
    """Return the modules that a file imports; without ``everywhere`` those only that its import needs."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        lazily = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not everywhere
        checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if lazily or checking:
            skipped |= set(ast.walk(node))
    found = set()
    for node in ast.walk(tree):
        if node not in skipped and isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif node not in skipped and isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_every_module_has_its_layer() -> None:
    assert {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in FILES} - {"__init__"} == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own == "__init__":
        return  # imports its names lazily
    for name in imports(path, everywhere=False):
        parts = name.split(".")
        if parts[0] == "deltaexp" and len(parts) > 1 and parts[1] in LEVEL:
            assert parts[1] == own in ("lab", "deltas", "commands", "interop") or LEVEL[parts[1]] < LEVEL[own], (
                f"{own} imports {name}"
            )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_libraries_stay_behind_their_fences(path: Path) -> None:
    own = path.relative_to(PACKAGE).as_posix()
    for name in imports(path, everywhere=True):
        library = name.split(".")[0]
        assert own in FENCES.get(library, {own}), f"{own} imports {library}"


def test_modules_stay_short() -> None:
    long = {path.name: count for path in FILES if (count := len(path.read_text("utf-8").splitlines())) > 400}
    assert not long
