import json
import shutil

import pytest

from gradot_jax.data.tokenizer import check_vocabulary, encode, load_tokenizer
from gradot_jax.errors import InputError

BOS = 2


def byte_pair_folder(source, target):
    """The same tokenizer in the older layout of OPT's repositories."""
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    (target / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (target / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "</s>", "eos_token": "</s>"}
    settings |= {"unk_token": "</s>", "pad_token": "<pad>", "add_bos_token": True}
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    return target


def test_the_tokenizer_alone_would_read_special_tokens_out_of_text(tokenizer):
    assert tokenizer("a</s>b").input_ids.count(BOS) == 2


@pytest.mark.parametrize("text", ["a</s>b", "</s>", "<pad><s>", "the cat</s></s> sat<unk>"])
def test_special_tokens_in_text_stay_text(tokenizer, text):
    ids = encode(tokenizer, text)
    assert not set(ids) & {0, 1, 2, 3}
    assert tokenizer.decode(ids) == text


def test_special_tokens_in_text_stay_text_in_the_vocab_and_merges_layout(
    tokenizer, tokenizer_folder, tmp_path
):
    other = load_tokenizer(byte_pair_folder(tokenizer_folder, tmp_path))
    assert other.bos_token_id == BOS
    assert encode(other, "the cat</s> sat") == encode(tokenizer, "the cat</s> sat")


def test_encode_adds_nothing(tokenizer):
    assert tokenizer.decode(encode(tokenizer, "the cat")) == "the cat"
    assert encode(tokenizer, "") == []


def test_text_longer_than_the_tokenizer_expects_is_encoded_whole_and_silently(tokenizer):
    text = "the cat sat " * 40
    assert tokenizer.decode(encode(tokenizer, text)) == text


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(InputError, match=r"no tokenizer here, expected tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{bad", '{"version": "1.0"}', "[]"])
def test_a_damaged_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="cannot be loaded as a tokenizer"):
        load_tokenizer(tmp_path)


def test_an_unreachable_name_is_refused():
    with pytest.raises(InputError, match=r"somebody/no-such-model: cannot be loaded"):
        load_tokenizer("somebody/no-such-model")


def test_code_beside_a_tokenizer_is_not_run(tokenizer_folder, tmp_path):
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    marker = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(InputError):
        load_tokenizer(tmp_path)
    assert not marker.exists()


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tokenizer):
    size = len(tokenizer)
    check_vocabulary(tokenizer, size)
    with pytest.raises(InputError, match=f"token id {size - 1}, but .* is {size - 1}"):
        check_vocabulary(tokenizer, size - 1)
