import gradot_jax
from gradot_jax.linalg.svd import svd


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
