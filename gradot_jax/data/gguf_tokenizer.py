"""The tokenizer that a GGUF file describes, as the files of a Hugging Face one.

`gpt2` is byte-level BPE with its merges, cut into words as `tokenizer.ggml.pre` names; `llama` is
SentencePiece's BPE, whose merges are ordered by the scores of what they make.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gradot_jax.data.tokenizer import load_tokenizer
from gradot_jax.errors import InputError
from gradot_jax.files.gguf_file import GGUFFile
from gradot_jax.files.strict_json import write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_KEY = "tokenizer.ggml."
_MOST_CUTS = 2**25
"""Sum of the squared lengths of tokens; 2e6 of Llama's."""
_TEMPLATE = "tokenizer.chat_template"
_LONGEST = 512
"""Characters of a token; SentencePiece's are cut in every place."""

_SPACE = "\u2581"
"""What SentencePiece writes for a space."""

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = {
    "gpt-2": [_GPT2],
    "smollm": [r"\p{N}", _GPT2],
    "llama-bpe": [rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"],
    "qwen2": [rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
}
"""Regular expressions that cut a text into words, one after another, by `tokenizer.ggml.pre`."""

_ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "seperator": "sep"}
_ROLES |= {"cls": "cls", "mask": "mask"}
"""Hugging Face's names of the roles of tokens, by GGUF's, misspelt as there."""


def write_tokenizer(folder: Path, file: GGUFFile) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and the chat template of a GGUF file.

    What was written is loaded and compared with the file: every token, which are special, what
    begins and ends a text, and the roles of tokens. Roles that a Hugging Face tokenizer has no
    field for, as those of filling in the middle, are not carried over; the tokens are.

    Args:
        folder: exists; it has the `config.json` of the model.
        file: with metadata of a tokenizer.

    Raises:
        InputError: when the file lacks some of it or has more than can be carried over, or the
            tokenizer that was written differs from it.
    """
    tokens, kinds = _vocabulary(file)
    roles = _roles(file, tokens, kinds)
    built = _build(file, tokens, kinds, roles)
    template = file.get(_TEMPLATE, str, None)
    length = file.get(f"{file.get('general.architecture', str)}.context_length", int)
    file.check_read("tokenizer.")
    built.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": length,
        **{f"{role}_token": tokens[index] for role, index in roles.items()},
    }
    if template is not None and "\r" in template:
        # A file of its own is read as text, which takes these away.
        settings["chat_template"] = template
    elif template is not None:
        (folder / "chat_template.jinja").write_text(template, "utf-8")
    write_json(folder / "tokenizer_config.json", settings)
    _compare(folder, file, tokens, kinds, built)


def _vocabulary(file: GGUFFile) -> tuple[list[str], np.ndarray]:
    tokens = file.get(f"{_KEY}tokens", list)
    kinds = file.get(f"{_KEY}token_type", np.ndarray)
    if len(kinds) != len(tokens) or not np.isin(kinds, range(_NORMAL, _BYTE + 1)).all():
        raise file.refused(f"{_KEY}token_type", f"a type in 1 to 6 of each of {len(tokens)} tokens")
    seen: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if not 0 < len(token) <= _LONGEST or seen.setdefault(token, index) != index:
            raise InputError(
                f"{file.path}: {_KEY}tokens has {token[:40]!r} at {index}, expected texts of 1 to "
                f"{_LONGEST} characters, each once"
            )
    return tokens, kinds


def _roles(file: GGUFFile, tokens: list[str], kinds: np.ndarray) -> dict[str, int]:
    """The token of each role, by Hugging Face's name of it."""
    suffix, roles = "_token_id", {}
    for key in file.metadata:
        if key.startswith(_KEY) and key.endswith(suffix):
            index, role = file.get(key, int), key[len(_KEY) : -len(suffix)]
            if index >= len(tokens):
                raise file.refused(key, f"one of {len(tokens)} tokens")
            if role in _ROLES:
                roles[_ROLES[role]] = index
    unknown = np.flatnonzero(kinds == _UNKNOWN)
    if "unk" not in roles and len(unknown):
        roles["unk"] = int(unknown[0])
    return roles


def _build(
    file: GGUFFile, tokens: list[str], kinds: np.ndarray, roles: dict[str, int]
) -> "Tokenizer":
    from tokenizers import AddedToken

    model = file.get(f"{_KEY}model", str)
    if model not in ("gpt2", "llama"):
        raise file.refused(f"{_KEY}model", "gpt2 or llama")
    special = _special(kinds, roles)
    added = special | {*np.flatnonzero(kinds == _USER).tolist()}
    # Those at the end are no part of the model that cuts words: a word could be one of them.
    own = 1 + max((i for i in range(len(tokens)) if i not in added), default=-1)
    vocabulary = {token: index for index, token in enumerate(tokens[:own])}
    try:
        if model == "gpt2":
            built = _byte_level(file, vocabulary)
        else:
            if "unk" not in roles:
                raise file.refused(f"{_KEY}unknown_token_id", "a token")
            built = _sentencepiece(file, vocabulary, kinds, tokens[roles["unk"]])
        for index in sorted(added):
            token = AddedToken(tokens[index], normalized=False, special=index in special)
            built.add_tokens([token])
        built.post_processor = _around(file, model, tokens, roles)
    except InputError:
        raise
    except Exception as error:  # The tokenizers library raises bare Exception for bad merges.
        raise InputError(f"{file.path}: {_KEY}merges do not fit its tokens: {error}") from None
    return built


def _special(kinds: np.ndarray, roles: dict[str, int]) -> set[int]:
    return {*np.flatnonzero((kinds == _CONTROL) | (kinds == _UNKNOWN)).tolist(), *roles.values()}


def _byte_level(file: GGUFFile, vocabulary: dict[str, int]) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    words = file.get(f"{_KEY}pre", str)
    if words not in _WORDS:
        raise file.refused(f"{_KEY}pre", " or ".join(_WORDS))
    if file.get(f"{_KEY}add_space_prefix", bool, False):
        raise file.refused(f"{_KEY}add_space_prefix", "false of a gpt2 tokenizer")
    file.get(f"{_KEY}scores", np.ndarray, None)  # Merges have an order and no scores.
    merges = [tuple(merge.split(" ")) for merge in file.get(f"{_KEY}merges", list)]
    if any(len(merge) != 2 for merge in merges):
        raise file.refused(f"{_KEY}merges", "pairs with a space between")
    built = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=words == "llama-bpe"))
    if words == "qwen2":
        built.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in _WORDS[words]]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.pre_tokenizer = pre_tokenizers.Sequence([*cuts, level])
    built.decoder = decoders.ByteLevel()
    return built


def _sentencepiece(
    file: GGUFFile, vocabulary: dict[str, int], kinds: np.ndarray, unknown: str
) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers

    file.get(f"{_KEY}pre", str, "default")
    file.get(f"{_KEY}merges", list, [])  # Some files have them; the scores say the same.
    scores = file.get(f"{_KEY}scores", np.ndarray)
    if len(scores) != len(kinds):
        raise file.refused(f"{_KEY}scores", f"one for each of {len(kinds)} tokens")
    normal = {token: index for token, index in vocabulary.items() if kinds[index] == _NORMAL}
    if odd := [t for t, i in vocabulary.items() if kinds[i] == _USER and _SPACE in t]:
        raise InputError(f"{file.path}: {_KEY}tokens has {odd[0]!r}, user-defined; not read")
    if sum(len(token) ** 2 for token in normal) > _MOST_CUTS:
        raise file.refused(f"{_KEY}tokens", "tokens of a few letters each")
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(normal, key=lambda token: -scores[normal[token]])
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in normal and token[cut:] in normal
    ]
    built = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = file.get(f"{_KEY}add_space_prefix", bool, True)
    front = [normalizers.Prepend(_SPACE)] if prefix else []
    built.normalizer = normalizers.Sequence([*front, normalizers.Replace(" ", _SPACE)])
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    built.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return built


def _around(file: GGUFFile, model: str, tokens: list[str], roles: dict[str, int]):
    """What is put before and behind a text."""
    from tokenizers import processors

    begins = model == "llama" or file.get(f"{_KEY}pre", str) == "llama-bpe"
    adds = {
        role: file.get(f"{_KEY}add_{role}_token", bool, default)
        for role, default in (("bos", begins), ("eos", False))
    }
    if file.get(f"{_KEY}add_sep_token", bool, False):
        raise file.refused(f"{_KEY}add_sep_token", "false")
    for role, add in adds.items():
        if add and role not in roles:
            raise file.refused(f"{_KEY}{role}_token_id", "a token, as it is added to texts")
    first, last = ([tokens[roles[role]]] if add else [] for role, add in adds.items())
    named = [(tokens[roles[role]], roles[role]) for role, add in adds.items() if add]
    return processors.TemplateProcessing(single=[*first, "$A", *last], special_tokens=named)


def _compare(
    folder: Path, file: GGUFFile, tokens: list[str], kinds: np.ndarray, built: "Tokenizer"
) -> None:
    """Loads what was written as anyone would, and refuses the first difference."""
    loaded, roles = load_tokenizer(folder), _roles(file, tokens, kinds)
    special = {index for index, token in loaded.added_tokens_decoder.items() if token.special}
    read = loaded.convert_ids_to_tokens(list(range(len(tokens))))
    found = [("the number of tokens", len(loaded), len(tokens))]
    found += [
        (f"token {index}", *both) for index, both in enumerate(zip(read, tokens, strict=True))
    ]
    found += [("the special tokens", special, _special(kinds, roles))]
    found += [(n, getattr(loaded, f"{n}_token_id"), roles.get(n)) for n in _ROLES.values()]
    found += [("the chat template", loaded.chat_template, file.get(_TEMPLATE, str, None))]
    ways = (json.loads(each.to_str()) for each in (loaded.backend_tokenizer, built))
    found += [("how texts are cut", *ways)]
    for what, got, said in found:
        if got != said:
            raise InputError(
                f"{file.path}: {what} of the tokenizer is {got!r:.80} when loaded, expected "
                f"{said!r:.80}"
            )
