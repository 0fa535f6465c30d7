import json
import resource
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.errors import InputError
from gradot_jax.files.digest import tree_digest
from gradot_jax.parallel import make_mesh
from gradot_jax.training.checkpoint_store import MANIFEST, CheckpointStore

IDENTITY = {"config": {"hidden_size": 16}, "emulator": "abc"}


def tree(seed=0):
    key = jax.random.key(seed)
    return {
        "adapter": {"kernel": jax.random.normal(key, (8, 4)), "empty": jnp.zeros((0, 4))},
        "half": jnp.arange(3, dtype=jnp.bfloat16),
        "count": jnp.int32(seed),
    }


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with CheckpointStore(folder, IDENTITY) as store:
        for step in (1, 2, 3):
            store.save(step, tree(step), {"best_loss": 0.1 * step})
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def test_newest_step_comes_back_exactly_with_its_notes(folder):
    with CheckpointStore(folder, IDENTITY) as store:
        checkpoint = store.restore(tree())
    assert checkpoint.step == 3
    assert checkpoint.notes == {"best_loss": 0.1 * 3}
    assert_same(checkpoint.state, tree(3))


def test_only_the_newest_steps_are_kept(folder):
    with CheckpointStore(folder, IDENTITY) as store:
        assert store.steps == [2, 3]


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    with CheckpointStore(tmp_path / "new", IDENTITY) as store:
        assert store.restore(tree()) is None


def test_restores_onto_another_mesh(folder):
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=make_mesh(data=1, model=1).replicated
        ),
        tree(),
    )
    spread = make_mesh(data=4, model=2).sharding("data", "model")
    kernel = abstract["adapter"]["kernel"]
    abstract["adapter"]["kernel"] = jax.ShapeDtypeStruct(
        kernel.shape, kernel.dtype, sharding=spread
    )
    with CheckpointStore(folder, IDENTITY) as store:
        state = store.restore(abstract).state
    assert state["adapter"]["kernel"].sharding == spread
    assert_same(state, tree(3))


def files_of_a_step():
    return ["_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt", "data", MANIFEST]


def find(step_folder, name):
    if name != "data":
        return step_folder / name
    return max(step_folder.glob("state/**/d/*"), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("name", files_of_a_step())
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_to_any_file_falls_back_to_the_step_before(folder, name, damage):
    path = find(folder / "3", name)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    with CheckpointStore(folder, IDENTITY) as store:
        with pytest.warns(RuntimeWarning, match="going back to step 2.*step 3: "):
            checkpoint = store.restore(tree())
        assert_same(checkpoint.state, tree(2))
        assert store.steps == [2]
        store.save(3, tree(7))
        assert_same(store.restore(tree()).state, tree(7))


def test_refuses_when_every_step_is_damaged_and_deletes_none(folder):
    for step in ("2", "3"):
        (folder / step / MANIFEST).unlink()
    with CheckpointStore(folder, IDENTITY) as store:
        with pytest.raises(InputError, match=r"no checkpoint is intact.*step 3.*step 2"):
            store.restore(tree())
        assert store.steps == [2, 3]


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        (IDENTITY | {"config": {"hidden_size": 32}}, "identity.config.hidden_size was 16, now 32"),
        (IDENTITY | {"emulator": "xyz"}, "identity.emulator was abc, now xyz"),
    ],
)
def test_another_run_cannot_resume(folder, identity, message):
    with CheckpointStore(folder, identity) as store, pytest.raises(InputError, match=message):
        store.restore(tree())


def test_another_structure_shape_or_dtype_is_named(folder):
    other = tree()
    other["half"] = other["half"].astype(jnp.float32)
    other["momentum"] = jnp.zeros(2)
    with CheckpointStore(folder, IDENTITY) as store, pytest.raises(InputError) as caught:
        store.restore(other)
    assert "arrays.half was bfloat16[3], now float32[3]" in str(caught.value)
    assert "arrays.momentum was None, now float32[2]" in str(caught.value)


def test_a_full_disk_is_an_error_and_leaves_the_step_before(folder, caplog):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    big = tree() | {"half": jax.random.normal(jax.random.key(1), (300, 300))}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        with (
            pytest.raises(OSError, match=r"step 4 could not be saved: .*File too large"),
            CheckpointStore(folder, IDENTITY) as store,
        ):
            store.save(4, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not caplog.records
    with CheckpointStore(folder, IDENTITY) as store:
        assert store.restore(tree()).step == 3


def test_manifest_names_versions_and_identity(folder):
    body = json.loads((folder / "3" / MANIFEST).read_text())["body"]
    assert body["identity"] == IDENTITY
    assert body["versions"]["jax"] == jax.__version__


def test_digest_depends_on_names_types_and_contents():
    ones = np.ones((2, 2), np.float32)
    digests = {
        tree_digest(t)
        for t in (
            {"a": ones},
            {"b": ones},
            {"a": 2 * ones},
            {"a": ones.reshape(4)},
            {"a": ones.astype(jnp.bfloat16)},
        )
    }
    assert len(digests) == 5
    assert tree_digest({"a": ones.T}) == tree_digest({"a": jnp.asarray(ones)})
