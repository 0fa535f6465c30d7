import errno
import os

import pytest

from gradot_jax.errors import InputError
from gradot_jax.files.folder import output_folder, regular_file


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_finished_folder_appears_with_its_parents_and_nothing_else(tmp_path):
    with output_folder(tmp_path / "a" / "out") as folder:
        (folder / "x").write_text("x")
        assert not (tmp_path / "a" / "out").exists()
    assert names(tmp_path / "a") == ["out"]
    assert (tmp_path / "a" / "out" / "x").read_text() == "x"


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with output_folder(tmp_path / "out") as folder:
        (folder / "x").touch()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["x"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path, failure, overwrite):
    if overwrite:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old").write_text("old")
    before = names(tmp_path)
    with pytest.raises(failure), output_folder(tmp_path / "out", overwrite=overwrite) as folder:
        (folder / "x").touch()
        raise failure
    assert names(tmp_path) == before
    if overwrite:
        assert (tmp_path / "out" / "old").read_text() == "old"


def test_a_full_disk_is_reported_as_such_and_leaves_nothing(tmp_path):
    with (
        pytest.raises(InputError, match=r"out: No space left on device; nothing was written"),
        output_folder(tmp_path / "out"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names(tmp_path) == []


def test_other_system_errors_pass_unchanged(tmp_path):
    with pytest.raises(FileNotFoundError), output_folder(tmp_path / "out"):
        raise FileNotFoundError(errno.ENOENT, "an input")


def test_an_existing_folder_is_kept_unless_overwriting(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(InputError, match="not empty"), output_folder(tmp_path / "out"):
        pass
    assert names(tmp_path / "out") == ["old"]
    with output_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["new"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(InputError, match="a file of this name"):
        output_folder(tmp_path / "out", overwrite=True).__enter__()


def test_the_working_folder_is_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match="working or home folder"):
        output_folder(tmp_path, overwrite=True).__enter__()


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"out: cannot be made"):
        output_folder(tmp_path / "file" / "out").__enter__()


def test_a_regular_file_is_found(tmp_path):
    (tmp_path / "x.safetensors").touch()
    assert regular_file(tmp_path, "x.safetensors") == tmp_path / "x.safetensors"


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "x\0", "x\n", ".x", 3, None]
)
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    with pytest.raises(InputError, match="is not the plain name"):
        regular_file(tmp_path, name)


def test_links_folders_and_absent_files_are_refused(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret").touch()
    (folder / "real").touch()
    (folder / "outside").symlink_to(tmp_path / "secret")
    (folder / "inside").symlink_to("real")
    (folder / "dangling").symlink_to("nothing")
    (folder / "sub").mkdir()
    for name in ("outside", "inside", "dangling"):
        with pytest.raises(InputError, match=f"{name}: is a symbolic link"):
            regular_file(folder, name)
    with pytest.raises(InputError, match="expected a regular file"):
        regular_file(folder, "sub")
    with pytest.raises(InputError, match="gone: missing"):
        regular_file(folder, "gone")


@pytest.mark.parametrize("shared", [False, True])
def test_links_of_the_hub_cache_are_followed_into_its_blobs_only(tmp_path, shared):
    repository = tmp_path / "models--o--n"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs = (tmp_path if shared else repository) / "blobs"
    blobs.mkdir()
    (blobs / "1234").touch()
    (tmp_path / "secret").touch()
    (snapshot / "good").symlink_to(os.path.relpath(blobs / "1234", snapshot))
    (snapshot / "bad").symlink_to("../../../secret")
    assert regular_file(snapshot, "good").is_file()
    with pytest.raises(InputError, match="bad: is a symbolic link"):
        regular_file(snapshot, "bad")
