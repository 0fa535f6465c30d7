"""Descriptions of folders: honest about damage, and harmless to a terminal."""

import json

import pytest

from gradot_jax.errors import InputError
from gradot_jax.models.checkpoint import save_model
from gradot_jax.offsite.adapter_file import save_adapter
from gradot_jax.offsite.bundle import receive
from gradot_jax.offsite.describe import describe, printable


@pytest.fixture
def bundle(case, tmp_path):
    folder = tmp_path / "bundle"
    case.write(folder)
    return folder


def test_bundle_is_described_and_verified(bundle):
    lines = describe(bundle)
    assert lines["kind"] == "emulator bundle"
    assert lines["middle 2"].startswith("q_proj dense, k_proj 4")
    assert lines["bundle digest"] == receive(bundle).digest
    verified = [label for label, value in lines.items() if value.endswith("digest verified")]
    assert verified == ["file README.md", "file adapter.safetensors", "file emulator.safetensors"]


def test_damage_is_reported(bundle):
    with (bundle / "adapter.safetensors").open("ab") as file:
        file.write(b"x")
    (bundle / "README.md").unlink()
    (bundle / "new\x1b[31m\n").write_text("")
    lines = describe(bundle)
    assert lines["file adapter.safetensors"].endswith("DIGEST DIFFERS")
    assert lines["file README.md"].endswith("DIGEST DIFFERS")
    assert lines["file new\\x1b[31m\\n"] == "NOT LISTED"


def test_adapter_is_described(case, bundle, tmp_path):
    opened = receive(bundle)
    save_adapter(tmp_path / "adapter", opened.emulator.adapter, opened)
    lines = describe(tmp_path / "adapter")
    assert lines["kind"] == "tuned adapter"
    assert lines["split"] == "first 1 and last 1 blocks are trained"
    assert lines["tuned in bundle"] == opened.digest


def test_checkpoint_is_described(case, tmp_path):
    save_model(tmp_path / "model", case.config, case.params)
    lines = describe(tmp_path / "model")
    assert lines["kind"] == "Hugging Face checkpoint"
    assert lines["file model.safetensors"].endswith("no digest")


def test_broken_manifest_and_foreign_folder_are_refused(bundle, tmp_path):
    (bundle / "manifest.json").write_text(json.dumps({"format": "\x1b[2J"}))
    with pytest.raises(InputError) as caught:
        describe(bundle)
    assert str(caught.value).isprintable()
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "absent"):
        with pytest.raises(InputError, match=folder):
            describe(tmp_path / folder)


@pytest.mark.parametrize("text", ["\x1b[31m", "a\r\nb", "\u202e", "\udcff", "\x00"])
def test_no_control_character_survives(text):
    assert printable(text).isprintable()
    assert printable("plain text, é") == "plain text, é"
