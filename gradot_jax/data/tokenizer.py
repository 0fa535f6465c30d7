"""Tokenizers: Hugging Face's, used without the special tokens that they would add themselves.

What a document or prompt begins with is decided once, by `document_start`, and put there by us.
Text is only text: a `</s>` in it is encoded as four characters or so, never as the token of that
name.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from gradot_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LAYOUTS = (("tokenizer.json",), ("vocab.json", "merges.txt"))


def load_tokenizer(path_or_id: str | Path, *, revision: str | None = None):
    """Loads a tokenizer from a folder or by its name on the Hugging Face hub; runs no code of it.

    Args:
        path_or_id: a folder with `tokenizer.json`, or `vocab.json` and `merges.txt`; or a name.
        revision: branch, tag or commit of a name.

    Raises:
        InputError: when there is no tokenizer that can be read.
    """
    folder = Path(path_or_id)
    if folder.is_dir() and not any(
        all((folder / file).is_file() for file in layout) for layout in _LAYOUTS
    ):
        raise InputError(
            f"{folder}: no tokenizer here, expected "
            + ", or ".join(" and ".join(layout) for layout in _LAYOUTS)
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(path_or_id), revision=revision or "main", trust_remote_code=False
        )
    except Exception as error:  # The tokenizers library raises bare Exception for a bad file.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path_or_id}: cannot be loaded as a tokenizer: {reason}") from None


def check_vocabulary(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> None:
    """Raises InputError unless every token has a row among the model's `vocab_size` embeddings.

    JAX clamps an index beyond the table, so a wrong tokenizer would otherwise go unnoticed.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise InputError(
            f"the tokenizer has the token id {largest}, but the model's vocab_size is {vocab_size}"
        )


def encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids of a text, none of them special: not added, and not read out of the text."""
    return tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, verbose=False
    ).input_ids


def encode_after(tokenizer: "PreTrainedTokenizerBase", prompt: str, text: str) -> list[int]:
    """Token ids of a text that follows a prompt, which is tokenised apart.

    SentencePiece takes the beginning of what it is given for that of a word: the text is then
    encoded behind the prompt, or behind a letter where the two share a token.
    """
    alone = encode(tokenizer, text)
    if not tokenizer.convert_ids_to_tokens(alone[:1] or [0])[0].startswith("\u2581"):
        return alone
    for head in (prompt, "a"):
        before, whole = encode(tokenizer, head), encode(tokenizer, head + text)
        if whole[: len(before)] == before:
            return whole[len(before) :]
    return alone


def tokens_in_front(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What the tokenizer by itself puts in front of a text: one token, or none.

    Raises:
        InputError: when it adds anything else.
    """
    text = "a"
    plain, whole = encode(tokenizer, text), tokenizer(text).input_ids
    start = whole[: len(whole) - len(plain)]
    if whole != start + plain or len(start) > 1:
        raise InputError(
            f"the tokenizer makes {whole} of {text!r}, expected {plain} with at most one token in "
            "front"
        )
    return start


def document_start(tokenizer: "PreTrainedTokenizerBase", config) -> int | None:
    """The token that every document and every prompt begins with, or None for none.

    It is what the tokenizer puts in front by itself, as the model saw it in training; of a family
    whose texts always begin with `bos_token_id`, that.

    Args:
        tokenizer: see `load_tokenizer`.
        config: of the model, see `gradot_jax.models.family.ModelConfig`.

    Raises:
        InputError: when the tokenizer adds anything but a token in front.
    """
    if config.family.begins_documents:
        return config.bos_token_id
    token = next(iter(tokens_in_front(tokenizer)), None)
    if token is not None and not 0 <= token < config.vocab_size:
        raise InputError(
            f"the tokenizer begins a text with the token {token}, expected one of the model's "
            f"vocabulary of {config.vocab_size}"
        )
    return token
