"""Tokenizers out of GGUF metadata against those that the metadata was taken from."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from gradot_jax.data import gguf_tokenizer
from gradot_jax.data.gguf_tokenizer import write_tokenizer
from gradot_jax.errors import InputError
from gradot_jax.files.gguf_file import GGUFFile

K = "tokenizer.ggml."
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "The capital of France is Paris.",
    "  two spaces,\ttabs\n\n\nand   12345 numbers ¾ 3.14, it's we'LL don't\r\n",
    "naïve cafe\u0301 日本語 🙂 Ⅷ ٣٤ <|im_start|>user\nhi<|im_end|>",
    "x+=1; $5 #!?... ~~~ a^b |c| <tool>hi</tool>   ",
    "",
    " ",
]
CORPUS = [*TEXTS, "the cat sat on the mat and the dog ran home, don't they 2024 " * 3]
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# As in the tokenizer.json of Llama 3 and of Qwen2.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern):
    return pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")


CUTS = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [split(LLAMA_3), BYTES],
    "qwen2": [split(LLAMA_3.replace("{1,3}", "")), BYTES],
}


def trained(words, specials_last):
    """A byte-level BPE as the models have it that `tokenizer.ggml.pre` names."""
    original = tokenizers.Tokenizer(models.BPE(ignore_merges=words == "llama-bpe"))
    if words == "qwen2":
        original.normalizer = normalizers.NFC()
    original.pre_tokenizer = pre_tokenizers.Sequence(CUTS[words])
    original.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    first = [] if specials_last else SPECIALS
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=first, initial_alphabet=alphabet, show_progress=False
    )
    original.train_from_iterator(CORPUS, trainer)
    original.add_special_tokens(SPECIALS)
    original.add_tokens(["<tool>"])
    return original


def described(original, words, **more):
    model = json.loads(original.to_str())
    vocabulary = original.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    kinds = [3 if token in SPECIALS else 4 if token == "<tool>" else 1 for token in tokens]
    return GGUFFile(
        Path("model.gguf"),
        {
            "general.architecture": "llama",
            "llama.context_length": 128,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": words,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": np.array(kinds, np.int32),
            "tokenizer.ggml.merges": [" ".join(merge) for merge in model["model"]["merges"]],
            "tokenizer.ggml.bos_token_id": vocabulary["<|im_start|>"],
            "tokenizer.ggml.eos_token_id": vocabulary["<|im_end|>"],
            "tokenizer.ggml.padding_token_id": vocabulary["<|endoftext|>"],
            "tokenizer.ggml.fim_pre_token_id": 5,
            **more,
        },
        {},
    )


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("words", CUTS)
def test_texts_are_cut_as_by_the_original(words, last, tmp_path):
    original = trained(words, last)
    file = described(original, words, **{f"{K}add_bos_token": False, f"{K}add_sep_token": False})
    write_tokenizer(tmp_path, file)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        expected = original.encode(text).ids
        assert loaded(text).input_ids == expected, text
        kept = normalizers.NFC().normalize_str(text) if words == "qwen2" else text
        assert loaded.decode(expected) == kept
    assert (loaded.bos_token, loaded.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (loaded.pad_token, loaded.unk_token) == ("<|endoftext|>", None)
    assert loaded.model_max_length == 128


def test_default_cuts_where_llama_cpp_does(tmp_path):
    write_tokenizer(tmp_path, described(trained("gpt-2", False), "default"))
    cut = AutoTokenizer.from_pretrained(tmp_path).backend_tokenizer.pre_tokenizer
    words = [word for word, _ in cut.pre_tokenize_str("it's 12345 $x+= y")]
    assert words == ["it", "'", "s", "Ġ", "123", "45", "Ġ", "$", "x", "+=", "Ġy"]


@pytest.mark.parametrize(
    ("words", "keys", "front", "behind"),
    [
        ("smollm", {}, [], []),
        ("llama-bpe", {}, ["<|im_start|>"], []),
        ("llama-bpe", {"bos": False}, [], []),
        ("qwen2", {"bos": True}, ["<|im_start|>"], []),
        ("gpt-2", {"bos": True, "eos": True}, ["<|im_start|>"], ["<|im_end|>"]),
        ("gpt-2", {"eos": True}, [], ["<|im_end|>"]),
    ],
)
def test_what_begins_and_ends_a_text_is_what_the_file_says(words, keys, front, behind, tmp_path):
    more = {f"tokenizer.ggml.add_{role}_token": add for role, add in keys.items()}
    write_tokenizer(tmp_path, described(trained(words, False), words, **more))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    plain = loaded("the cat", add_special_tokens=False).input_ids
    ids = loaded("the cat").input_ids
    assert ids == [*loaded.convert_tokens_to_ids([*front]), *plain, *map(loaded.vocab.get, behind)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_chat_template_goes_along(end, tmp_path):
    template = f"{{% for m in messages %}}{{{{ m.content }}}}é{end}{{% endfor %}}{end}"
    original = trained("smollm", False)
    write_tokenizer(tmp_path, described(original, "smollm", **{TEMPLATE: template}))
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == template
    apart = tmp_path / "chat_template.jinja"
    assert apart.exists() == (end == "\n")


TEMPLATE = "tokenizer.chat_template"
PIECES = [
    "\u2581the",
    "\u2581th",
    "he",
    "\u2581t",
    "at",
    "cat",
    "\u2581c",
    "\u2581cat",
    "in",
    "ing",
]
PIECES += ["th", "ea", "\u2581\u2581", "an", "\u2581a", *"\u2581theacing,n\n"]


def sentencepiece(**more):
    pieces = list(dict.fromkeys(PIECES))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces, "<tool>"]
    scores = [0.0, 0.0, 0.0, *[0.0] * 256, *(-float(i) for i in range(len(pieces))), 0.0]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(pieces), 4]
    metadata = {
        "general.architecture": "llama",
        "llama.context_length": 128,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return GGUFFile(Path("model.gguf"), metadata | more, {})


def greedy(text, tokens, scores):
    """SentencePiece's BPE as it is defined: of all neighbours the best together, from the left."""
    rank = {token: scores[i] for i, token in enumerate(tokens) if i >= 259}
    parts = list(text.replace(" ", "\u2581"))
    while True:
        pairs = [(rank.get(a + b, -np.inf), -i) for i, (a, b) in enumerate(pairwise(parts))]
        if not pairs or max(pairs)[0] == -np.inf:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    ids = []
    for part in parts:
        raw = [tokens.index(f"<0x{byte:02X}>") for byte in part.encode()]
        ids += [tokens.index(part)] if part in rank else raw
    return ids


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_merges_the_best_pair_first(prefix, tmp_path):
    file = sentencepiece(**{"tokenizer.ggml.add_space_prefix": prefix})
    write_tokenizer(tmp_path, file)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    tokens, scores = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.scores"]
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice([*"theacing, \n"], 25)) for _ in range(60)]
    texts += ["the cat eating", "  the  cat", "é🙂\tthe", "zzz"]
    for text in texts:
        expected = greedy(" " * prefix + text, tokens, scores)
        assert loaded(text, add_special_tokens=False).input_ids == expected, text
        assert loaded(text).input_ids == [1, *expected]
        assert loaded.decode(expected) == text
    behind = loaded("<tool>the</s>").input_ids
    assert behind == [1, len(tokens) - 1, *greedy(" " * prefix + "the", tokens, scores), 2]
    assert (loaded.unk_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)


def without(file, key):
    del file.metadata[key]
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{K}pre": "tekken"}, "tokenizer.ggml.pre is 'tekken', expected gpt-2 or smollm"),
        ({f"{K}pre": None}, "tokenizer.ggml.pre is absent"),
        ({f"{K}model": "t5"}, "tokenizer.ggml.model is 't5', expected gpt2 or llama"),
        ({f"{K}token_type": None}, "token_type is absent, expected a list of numbers"),
        ({f"{K}token_type": np.ones(3, np.int32)}, "a type in 1 to 6 of each of 331 tokens"),
        ({f"{K}merges": ["a b c"]}, "expected pairs with a space between"),
        ({f"{K}merges": ["a zzzz"]}, "merges do not fit its tokens: .*Token `zzzz` out of vocab"),
        ({f"{K}bos_token_id": 9999}, "bos_token_id is 9999, expected one of 331 tokens"),
        ({f"{K}fim_mid_token_id": 9999}, "fim_mid_token_id is 9999"),
        ({f"{K}bos_token_id": "x"}, "bos_token_id is 'x', expected a whole number"),
        ({f"{K}add_bos_token": 1}, "add_bos_token is 1, expected true or false"),
        ({f"{K}add_bos_token": True, f"{K}bos_token_id": None}, "expected a token, as it is added"),
        ({f"{K}add_space_prefix": True}, "expected false of a gpt2 tokenizer"),
        ({f"{K}add_sep_token": True}, "add_sep_token is True, expected false"),
        ({f"{K}precompiled_charsmap": "x"}, "cannot carry: 'tokenizer.ggml.precompiled_charsmap'"),
        ({f"{TEMPLATE}.tools": "x"}, "cannot carry: 'tokenizer.chat_template.tools'"),
        ({TEMPLATE: 3}, "tokenizer.chat_template is 3, expected text"),
        ({f"{K}tokens": ["a", "a"], f"{K}token_type": np.ones(2, np.int32)}, "tokens has 'a' at 1"),
        ({f"{K}tokens": ["a" * 9999], f"{K}token_type": np.ones(1, np.int32)}, "1 to 512 char"),
    ],
)
def test_what_cannot_be_carried_over_is_refused_by_key(change, message, tmp_path):
    file = described(trained("smollm", False), "smollm")
    metadata = {k: v for k, v in (file.metadata | change).items() if v is not None}
    with pytest.raises(InputError, match=message) as refused:
        write_tokenizer(tmp_path, GGUFFile(file.path, metadata, {}))
    assert "model.gguf" in str(refused.value) and not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{K}scores": np.zeros(3, np.float32)}, "expected one for each of"),
        ({f"{K}scores": np.full(281, np.nan, np.float32)}, "scores is .* expected a list of num"),
    ],
)
def test_of_sentencepiece_scores_are_needed(change, message, tmp_path):
    with pytest.raises(InputError, match=message):
        write_tokenizer(tmp_path, sentencepiece(**change))
    with pytest.raises(InputError, match="scores is absent"):
        write_tokenizer(tmp_path, without(sentencepiece(), f"{K}scores"))


def test_user_defined_tokens_with_spaces_are_refused_of_sentencepiece(tmp_path):
    file = sentencepiece()
    at = file.metadata[f"{K}tokens"].index("\u2581\u2581")
    file.metadata[f"{K}token_type"][at] = 4
    with pytest.raises(InputError, match="user-defined"):
        write_tokenizer(tmp_path, file)


def other_order(folder):
    values = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["!"], vocabulary["#"] = vocabulary["#"], vocabulary["!"]
    (folder / "tokenizer.json").write_text(json.dumps(values))


def other_words(folder):
    values = json.loads((folder / "tokenizer.json").read_text())
    values["pre_tokenizer"]["pretokenizers"].pop(0)
    (folder / "tokenizer.json").write_text(json.dumps(values))


def fewer_specials(folder):
    values = json.loads((folder / "tokenizer.json").read_text())
    values["added_tokens"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(values))


def other_end(folder):
    values = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(values | {"eos_token": "!"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_order, "token 3 of the tokenizer is '#' when loaded, expected '!'"),
        (other_words, "how texts are cut of the tokenizer"),
        (fewer_specials, "the number of tokens of the tokenizer is 330 when loaded, expected 331"),
        (other_end, "the special tokens of the tokenizer"),
    ],
)
def test_a_tokenizer_that_differs_from_the_file_is_an_error(damage, message, tmp_path, monkeypatch):
    load = gguf_tokenizer.load_tokenizer

    def damaged(folder):
        damage(folder)
        return load(folder)

    monkeypatch.setattr(gguf_tokenizer, "load_tokenizer", damaged)
    with pytest.raises(InputError, match=message):
        write_tokenizer(tmp_path, described(trained("smollm", False), "smollm"))
