"""`gradot plug-in`: the model owner puts a returned adapter in place."""

import dataclasses
from pathlib import Path

from gradot_jax.cli.common import Debuggable, check_new


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlugIn(Debuggable):
    """Puts a tuned adapter around the original middle and writes a Hugging Face checkpoint.

    An adapter of another model or split is refused. How far each block has moved is printed,
    for the owner to judge.

    Example: gradot plug-in --model facebook/opt-1.3b --adapter tuned/adapter --out opt-1.3b-tuned

    Attributes:
        model: the original: a checkpoint folder, or an id on the Hugging Face Hub.
        adapter: folder that the data owner returned.
        out: folder to make.
        revision: branch, tag or commit on the Hub.
        overwrite: replace an existing folder.
    """

    model: str
    adapter: Path
    out: Path
    revision: str | None = None
    overwrite: bool = False

    def run(self) -> None:
        """Executes the command."""
        check_new(self.out, overwrite=self.overwrite)
        from gradot_jax.models.opt.hf import checkpoint_folder, load_opt, save_opt
        from gradot_jax.offsite.adapter_file import adapter_report, check_adapter, load_adapter
        from gradot_jax.offsite.plug_in import plug_in

        folder = checkpoint_folder(self.model, self.revision)
        config, params = load_opt(folder, dtype=None)
        adapter, manifest = load_adapter(self.adapter, config)
        check_adapter(manifest, config, params)
        for change in adapter_report(config, params, adapter):
            print(
                f"layer {change.layer}: moved by {change.relative:.2%} of its norm, "
                f"largest change {change.largest:.3g}"
            )
        tuned = plug_in(params, adapter)
        save_opt(self.out, config, tuned, tokenizer_from=folder, overwrite=self.overwrite)
        print(f"{self.out}: the tuned model")
