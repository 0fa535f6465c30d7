import ast
from pathlib import Path

import gradot_jax
from gradot_jax.linalg.svd import svd

PACKAGE = Path(gradot_jax.__file__).parent


def test_every_name_of_the_stub_is_there_and_no_other():
    assert gradot_jax.svd is svd
    for name in gradot_jax.__all__:
        assert name.isupper() or getattr(gradot_jax, name).__name__ == name
    assert set(gradot_jax.__all__) < set(dir(gradot_jax))
    assert not hasattr(gradot_jax, "does_not_exist")


def test_all_names_can_be_imported_at_once():
    names: dict = {}
    exec("from gradot_jax import *", names)
    assert set(gradot_jax.__all__) <= names.keys()


def test_type_checkers_see_every_name():
    # A stub re-exports what it imports under its own name, and is read where `py.typed` lies.
    assert (PACKAGE / "py.typed").is_file()
    statements = ast.parse((PACKAGE / "__init__.pyi").read_text("utf-8")).body
    imports = [node for node in statements if isinstance(node, ast.ImportFrom)]
    names = [alias for node in imports for alias in node.names]
    assert all(alias.asname == alias.name for alias in names)
    assert sorted(alias.name for alias in names) == gradot_jax.__all__


def test_every_name_says_what_it_is():
    for name in gradot_jax.__all__:
        value = getattr(gradot_jax, name)
        assert name.isupper() or (value.__doc__ or "").strip(), name
