"""Tokenizers: Hugging Face's, used without the special tokens that they would add themselves.

The rule for the first token is one, everywhere: a document or prompt begins with one
`bos_token_id` of the model, put there by us (`BOS_RULE`, written into results). Text is only
text: a `</s>` in it is encoded as four characters or so, never as the token of that name.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from gradot_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOS_RULE = "document"
"""Every document and every prompt begins with the model's `bos_token_id`."""

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
