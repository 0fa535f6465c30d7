"""The structure of the package, read from its sources: who imports whom, what has which name."""

import ast
import functools
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import gradot_jax

PACKAGE = Path(gradot_jax.__file__).parent
ARRAYS = {"linalg", "nn"}
FOLDERS = {
    "linalg": set(),
    "nn": {"linalg"},
    "files": set(),
    "curvature": ARRAYS,
    "compression": ARRAYS | {"curvature"},
    "models": ARRAYS | {"curvature", "compression", "files"},
    "data": {"nn", "files"},
    "evaluation": {"models", "data", "nn", "files"},
    "calibration": ARRAYS | {"curvature", "files", "models"},
    "training": {"nn", "files", "models"},
    "offsite": {"nn", "files", "compression", "models", "data"},
    "methods": None,
    "memory": None,
    "programs": None,
    "comparison": None,
    "demo": None,
    "cli": None,
}
"""What each folder may import of the others; None for all but those above it."""
UPPER = ("methods", "memory", "programs", "comparison", "demo", "cli")
"""From the lowest to the highest: none imports one behind it."""
SHARED = {"errors", "parallel", "progress", "__version__"}
"""Modules beside the folders, open to all; arrays report no progress."""
HEAVY = {"jax", "flax", "optax", "orbax", "transformers", "datasets", "matplotlib", "torch"}
"""What a command loads only once its arguments are known to be right."""
SOURCES = sorted(PACKAGE.rglob("*.py"))
LONGEST_CHAIN = 9
MOST_FILES = 15
FAMILIES = {path.name for path in (PACKAGE / "models").iterdir() if (path / "config.py").is_file()}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


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


def at_module_level(tree: ast.Module) -> list[ast.AST]:
    """Nodes that run on import; the bodies of functions do not, nor do typing's."""

    def run(node: ast.AST):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        yield node
        for child in ast.iter_child_nodes(node):
            yield from run(child)

    return list(run(tree))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def own_modules(names: set[str]) -> set[str]:
    """Modules of this package that are loaded for imported names."""
    found = {name if name in MODULES else name.rpartition(".")[0] for name in names}
    return {name for name in found if name in MODULES and name != "gradot_jax"}


@functools.cache
def loaded_by(module: str) -> frozenset[str]:
    """What a module imports of this package as it is imported."""
    return frozenset(own_modules(imported(at_module_level(parse(MODULES[module])))))


@functools.cache
def chain(module: str) -> tuple[str, ...]:
    """The longest chain of imports that begins with a module."""
    rest = max((chain(name) for name in loaded_by(module) - {module}), key=len, default=())
    return (module, *rest)


def test_every_folder_has_a_rule():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders == FOLDERS.keys()


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_run_one_way(folder):
    allowed = FOLDERS[folder]
    if allowed is None:
        allowed = FOLDERS.keys() - set(UPPER[UPPER.index(folder) + 1 :])
    shared = SHARED - {"progress"} if folder in ARRAYS else SHARED
    for path in sorted((PACKAGE / folder).rglob("*.py")):
        parts = own_parts(imported(ast.walk(parse(path))))
        forbidden = parts - allowed - shared - {folder}
        assert not forbidden, f"{path.relative_to(PACKAGE)} imports {sorted(forbidden)}"


def test_no_decision_is_made_for_the_default_device():
    # It belongs to the devices that arrays are on, see `nn.platform`.
    for path in SOURCES:
        source = path.read_text(encoding="utf-8")
        assert not re.search(r"default_backend|devices\([^)]*\)\[0\]\.platform", source), path


def test_no_chain_of_imports_is_long():
    longest = max(map(chain, MODULES), key=len)
    assert len(longest) <= LONGEST_CHAIN, " -> ".join(longest)


def test_nothing_is_imported_by_a_name_that_is_computed():
    for path in SOURCES:
        if path == PACKAGE / "__init__.py":
            continue
        names = {node.id for node in ast.walk(parse(path)) if isinstance(node, ast.Name)}
        assert not names & {"import_module", "__import__"}, path.relative_to(PACKAGE)


def test_a_family_is_named_in_its_folder_alone():
    for path in SOURCES:
        folder, *rest = path.relative_to(PACKAGE).parts
        of_family = folder == "models" and rest[0] in FAMILIES
        if of_family or folder == "demo" or path.name == "families.py":
            continue
        own = {f"gradot_jax.models.{family}" for family in FAMILIES}
        text, names = path.read_text(encoding="utf-8"), imported(ast.walk(parse(path)))
        assert not {n for n in names if n.startswith(tuple(own))}, path.relative_to(PACKAGE)
        for word in ("OPTConfig", "model.decoder", "embed_positions.weight", '"fc1"', '"fc2"'):
            assert word not in text, f"{path.relative_to(PACKAGE)} has {word}"


def test_no_table_but_one_is_keyed_by_the_names_of_methods():
    from gradot_jax.methods.table import METHODS

    for path in SOURCES:
        if path == PACKAGE / "methods" / "table.py":
            continue
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Dict):
                keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
                # One name may be a field of the options, such as `crash`.
                assert len(keys & METHODS.keys()) < 2, f"{path.relative_to(PACKAGE)}: {keys}"


def test_names_of_files_are_unique():
    exempt = {"__init__.py"}
    names = Counter(
        path.name
        for path in SOURCES
        if path.name not in exempt
        and path.relative_to(PACKAGE).parts[0] != "cli"
        and path.parent.name not in FAMILIES
    )
    assert not [name for name, count in names.items() if count > 1]


def test_no_folder_is_crowded():
    for folder in {path.parent for path in SOURCES} - {PACKAGE / "cli"}:
        files = [path for path in folder.iterdir() if path.is_file()]
        assert len(files) <= MOST_FILES, f"{folder.relative_to(PACKAGE)} has {len(files)} files"


def test_no_folder_has_more_than_a_fifth_of_the_lines():
    lines = Counter()
    for path in SOURCES:
        lines[path.relative_to(PACKAGE).parts[0]] += len(path.read_text("utf-8").splitlines())
    folder, most = lines.most_common(1)[0]
    assert most <= lines.total() / 5, f"{folder} has {most} of {lines.total()}"


def test_records_are_not_unpacked_by_position():
    found = []
    for path in SOURCES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name | ast.Attribute):
                # Tuples by nature: an array's shape, what is kept for a custom gradient.
                exempt = ast.unparse(node.value).split(".")[-1] in ("shape", "residual")
                lengths = (len(t.elts) for t in node.targets if isinstance(t, ast.Tuple))
                if max(lengths, default=0) > 3 and not exempt:
                    found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert not found


def test_nothing_is_asserted_of_what_comes_from_outside():
    for path in SOURCES:
        found = [n.lineno for n in ast.walk(parse(path)) if isinstance(n, ast.Assert)]
        assert not found, f"{path.relative_to(PACKAGE)}: assert at {found}"


def test_commands_name_nothing_heavy_before_they_run():
    for path in sorted((PACKAGE / "cli").rglob("*.py")):
        names = imported(at_module_level(parse(path)))
        heavy = {name.split(".")[0] for name in names} & HEAVY
        assert not heavy, f"{path.name} imports {sorted(heavy)}"


@pytest.mark.parametrize(
    "module", ["gradot_jax", "gradot_jax.cli.main", "gradot_jax.methods.table"]
)
def test_importing_loads_nothing_heavy(module):
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert not HEAVY & set(output.stdout.split())
