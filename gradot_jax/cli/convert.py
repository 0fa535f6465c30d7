"""`gradot convert`: a GGUF file as a plain checkpoint."""

import dataclasses
from pathlib import Path

import tyro

from gradot_jax.cli.common import Debuggable, Dtype, check_new
from gradot_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert(Debuggable):
    """Turns a GGUF file (llama.cpp's) into a Hugging Face checkpoint with its tokenizer.

    Llama (which Mistral, SmolLM2 and TinyLlama are there), Qwen2 and Qwen3, in every quantisation
    that the gguf package reads: pip install 'gradot_jax[gguf]'. The weights are those of the file
    to the last bit, in float32; they take four bytes each, however few they took in the file.
    What a checkpoint cannot say is refused by its name, and the tokenizer is loaded again and
    compared with the file.

    Example: gradot convert SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2

    Attributes:
        source: the file, a folder that holds it, or an id on the Hugging Face Hub.
        out: folder to make.
        file: the file's name in the folder or repository, where there are several.
        dtype: of the weights; float32 is exact, the others round.
        revision: branch, tag or commit on the Hub.
        overwrite: replace an existing folder.
    """

    source: tyro.conf.Positional[str]
    out: Path
    file: str | None = None
    dtype: Dtype = "float32"
    revision: str | None = None
    overwrite: bool = False

    def run(self) -> None:
        """Executes the command."""
        check_new(self.out, overwrite=self.overwrite)
        from gradot_jax.data.gguf_tokenizer import write_tokenizer
        from gradot_jax.files.folder import output_folder
        from gradot_jax.files.gguf_file import open_gguf
        from gradot_jax.models.convert import find_gguf, write_config, write_weights

        path = find_gguf(self.source, self.file, self.revision)
        if path.resolve().is_relative_to(self.out.resolve()):
            raise InputError(f"{self.out}: holds the file to convert, {path.name}; choose another")
        file = open_gguf(path)
        with output_folder(self.out, overwrite=self.overwrite) as folder:
            config = write_config(folder, file, self.dtype)
            write_tokenizer(folder, file)
            write_weights(folder, file, config)
        kinds = sorted({tensor.kind.name for tensor in file.tensors.values()})
        exact = "exact" if self.dtype == "float32" else "rounded"
        print(
            f"{self.out}: {config.family.describe(config)}, from {', '.join(kinds)} to "
            f"{self.dtype} ({exact}), with its tokenizer"
        )
