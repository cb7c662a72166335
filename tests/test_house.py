"""The arrows between the rooms of src/, and the sizes of files and functions."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
FILES = sorted((SOURCE / "transkd").rglob("*.py"))
COMMANDS = {f"transkd.{name}" for name in ("train", "evaluate", "predict", "export", "check")}
# rooms, and the rooms of ours that they may import from
ALLOWED = {
    "layers": {"layers", "errors"},
    "losses": {"losses", "layers", "errors", "outputs", "files"},
    "models": {"models", "layers", "errors", "outputs", "files", "transkd"},
    "data": {"data", "errors", "outputs", "metrics", "files"},
}
TORCH_ALONE = {"layers", "losses"}
LINES, FUNCTION_LINES = 350, 60


def module_name(path):
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path):
    """Each imported module and whether the import stands at the top of the file (type checking included)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(name if name in MODULES else node.module, id(node) in top) for name in names]
    return found


MODULES = {module_name(path) for path in FILES}


def room(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_arrows(path):
    module = module_name(path)
    here = room(module)
    for imported, _ in imports_of(path):
        if imported.split(".")[0] != "transkd":
            outside = imported.split(".")[0]
            if here in TORCH_ALONE:
                assert outside in {"torch"} or outside in STANDARD, f"{module} imports {imported}"
            continue
        if here in ALLOWED:
            assert room(imported) in ALLOWED[here], f"{module} imports {imported}"
        assert imported not in COMMANDS, f"{module} imports the command {imported}"


STANDARD = __import__("sys").stdlib_module_names


def test_no_import_hides_in_a_function():
    """Commands import late, so that --help and a mistake in the configuration do not wait for torch."""
    late = defaultdict(list)
    for path in FILES:
        for imported, at_top in imports_of(path):
            if imported.startswith("transkd.") and not at_top and module_name(path) not in COMMANDS:
                late[module_name(path)].append(imported)
    assert late == {}


def test_no_cycle():
    graph = {
        module_name(path): {name for name, _ in imports_of(path) if name in MODULES and name != module_name(path)}
        for path in FILES
    }
    done, walking = set(), []

    def walk(module):
        assert module not in walking, " → ".join([*walking[walking.index(module) :], module])
        if module in done:
            return
        walking.append(module)
        for imported in sorted(graph[module]):
            walk(imported)
        walking.pop()
        done.add(module)

    for module in sorted(graph):
        walk(module)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_sizes(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < FUNCTION_LINES, f"{node.name} of {path.name}"
