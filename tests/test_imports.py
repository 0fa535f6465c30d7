import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gradot_jax

PACKAGE = Path(gradot_jax.__file__).parent
FOLDERS = {
    "linalg": set(),
    "nn": {"linalg"},
    "files": set(),
    "curvature": {"linalg", "nn"},
    "compression": {"linalg", "nn", "curvature"},
    "models": {"linalg", "nn", "files"},
    "data": {"nn", "files"},
    "evaluation": {"models", "data", "nn"},
    "offsite": {"linalg", "nn", "files", "curvature", "compression", "models"},
    "comparison": None,
    "demo": None,
    "cli": None,
}
"""What each folder may import of the others; None for anything."""
SHARED = {"errors", "parallel", "progress"}
"""Modules beside the folders, open to all but the arrays."""
ARRAYS = {"linalg", "nn"}
HEAVY = {"jax", "flax", "optax", "orbax", "transformers", "datasets", "matplotlib", "torch"}
"""What a command loads only once its arguments are known to be right."""
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imported(nodes) -> set[str]:
    """Modules that import statements name, a name from a package counted as its module."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_parts(names: set[str]) -> set[str]:
    """Folders and top-level modules of this package among imported modules."""
    return {name.split(".")[1] for name in names if name.startswith("gradot_jax.")}


def at_module_level(tree: ast.Module) -> list[ast.stmt]:
    """Statements that run on import; the bodies of functions do not, nor does typing's."""

    def run(node: ast.AST):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        yield node
        for child in ast.iter_child_nodes(node):
            yield from run(child)

    return list(run(tree))


def test_every_folder_has_a_rule():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders == FOLDERS.keys()


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_run_one_way(folder):
    allowed = FOLDERS[folder]
    shared = SHARED - {"progress"} if folder in ARRAYS else SHARED
    for path in sorted((PACKAGE / folder).rglob("*.py")):
        parts = own_parts(imported(ast.walk(ast.parse(path.read_text()))))
        forbidden = set() if allowed is None else parts - allowed - shared - {folder, "__version__"}
        assert not forbidden, f"{path.relative_to(PACKAGE)} imports {sorted(forbidden)}"


def test_nothing_but_commands_and_demo_imports_them():
    for path in SOURCES:
        if path.relative_to(PACKAGE).parts[0] in ("cli", "demo"):
            continue
        parts = own_parts(imported(ast.walk(ast.parse(path.read_text()))))
        own = {path.relative_to(PACKAGE).parts[0]}
        assert not parts & {"cli", "demo", "comparison"} - own, path.relative_to(PACKAGE)


def test_commands_name_nothing_heavy_before_they_run():
    for path in sorted((PACKAGE / "cli").rglob("*.py")):
        names = imported(at_module_level(ast.parse(path.read_text())))
        heavy = {name.split(".")[0] for name in names} & HEAVY
        assert not heavy, f"{path.name} imports {sorted(heavy)}"


@pytest.mark.parametrize("module", ["gradot_jax", "gradot_jax.cli.main"])
def test_importing_loads_nothing_heavy(module):
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert not HEAVY & set(output.stdout.split())
