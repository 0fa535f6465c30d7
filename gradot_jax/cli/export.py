"""`gradot export`: an emulator as a plain checkpoint."""

import dataclasses
from pathlib import Path

from gradot_jax.cli.common import Debuggable, check_new


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(Debuggable):
    """Writes a bundle's emulator as a standard Hugging Face checkpoint.

    Factors are multiplied back and pruned channels padded with zeros, so the logits are the
    emulator's and any program that reads the original reads it. It is as large as a model of
    that depth.

    Example: gradot export --bundle opt-1.3b-offsite/bundle --out emulator

    Attributes:
        bundle: folder that the model's owner shipped.
        out: folder to make.
        adapter: a tuned adapter to take instead of the shipped one.
        overwrite: replace an existing folder.
    """

    bundle: Path
    out: Path
    adapter: Path | None = None
    overwrite: bool = False

    def run(self) -> None:
        """Executes the command."""
        check_new(self.out, overwrite=self.overwrite)
        import jax

        from gradot_jax.models.checkpoint import save_model
        from gradot_jax.offsite.adapter_file import load_adapter_for
        from gradot_jax.offsite.bundle import receive
        from gradot_jax.offsite.export import export_params

        bundle = receive(self.bundle, with_tokenizer=False)
        tuned = None
        if self.adapter is not None:
            tuned = load_adapter_for(self.adapter, bundle)
            shipped = bundle.emulator.adapter
            tuned = jax.tree.map(lambda new, old: new.astype(old.dtype), tuned, shipped)
        config, params = export_params(bundle.config, bundle.emulator.assemble(tuned))
        save_model(self.out, config, params, tokenizer_from=self.bundle, overwrite=self.overwrite)
        print(f"{self.out}: the emulator as a dense model of {config.num_hidden_layers} layers")
