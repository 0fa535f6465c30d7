import json
import shutil

import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing

from gradot_jax.data.examples import prompt_examples, token_stream
from gradot_jax.data.records import Prompt, PromptRecords
from gradot_jax.data.tokenizer import (
    check_vocabulary,
    document_start,
    encode,
    encode_after,
    load_tokenizer,
    tokens_in_front,
)
from gradot_jax.errors import InputError
from gradot_jax.models.families import read_config

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


LLAMA = read_config({"model_type": "llama", "bos_token_id": 1})


def with_template(folder, target, single):
    """The same tokenizer with something else put around a text."""
    shutil.copytree(folder, target)
    whole = tokenizers.Tokenizer.from_file(str(target / "tokenizer.json"))
    special = [(token, whole.token_to_id(token)) for token in ("<s>", "</s>") if token in single]
    whole.post_processor = TemplateProcessing(single=single, special_tokens=special)
    whole.save(str(target / "tokenizer.json"))
    return load_tokenizer(target)


def test_a_document_begins_with_what_the_tokenizer_puts_in_front(
    tokenizer, tokenizer_folder, tmp_path
):
    assert document_start(tokenizer, LLAMA) == BOS != LLAMA.bos_token_id
    plain = with_template(tokenizer_folder, tmp_path / "plain", "$A")
    assert tokens_in_front(plain) == [] and document_start(plain, LLAMA) is None
    stream = token_stream(plain, ["the cat", "a dog"], document_start(plain, LLAMA))
    assert stream.tolist() == encode(plain, "the cat") + encode(plain, "a dog")


def test_an_opt_document_begins_with_bos_whatever_the_tokenizer_says(tokenizer_folder, tmp_path):
    plain = with_template(tokenizer_folder, tmp_path / "plain", "$A")
    assert document_start(plain, read_config({"model_type": "opt"})) == 2


@pytest.mark.parametrize("single", ["<s> </s> $A", "$A </s>"])
def test_a_tokenizer_that_adds_anything_else_is_refused(tokenizer_folder, tmp_path, single):
    other = with_template(tokenizer_folder, tmp_path / "other", single)
    with pytest.raises(InputError, match="at most one token in front"):
        document_start(other, LLAMA)


@pytest.fixture
def sentence_piece(tmp_path):
    """Marks the beginning of a word, and takes that of a text for one."""
    tokens = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "c", "\u2581a", "\u2581b", "\u2581c"]
    merges = [("\u2581", letter) for letter in "abc"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = tokenizers.models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>")
    whole = tokenizers.Tokenizer(model)
    whole.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    whole.decoder = tokenizers.decoders.Metaspace()
    whole.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize(("prompt", "completion"), [("a", " b"), ("a", "bc"), ("a b", " a c")])
def test_a_completion_is_tokenised_as_it_stands_behind_its_prompt(
    sentence_piece, prompt, completion
):
    whole = encode(sentence_piece, prompt + completion)
    assert (
        encode(sentence_piece, prompt) + encode_after(sentence_piece, prompt, completion) == whole
    )
    records = PromptRecords((Prompt(prompt, completion),), "here")
    examples, _ = prompt_examples(sentence_piece, records, None, 16)
    used = int(examples.attention_mask.sum())
    assert [*examples.input_ids[0, :used], examples.targets[0, used - 1]] == whole


def test_a_beginning_outside_the_vocabulary_is_refused(tokenizer):
    small = read_config({"model_type": "llama", "vocab_size": 2, "eos_token_id": 1})
    with pytest.raises(InputError, match="begins a text with the token 2, expected"):
        document_start(tokenizer, small)
