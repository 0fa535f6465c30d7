"""`gradot plug-in`: the model owner puts a returned adapter in place."""

import dataclasses
from pathlib import Path

from gradot_jax.cli.common import Debuggable, check_new


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlugIn(Debuggable):
    """Puts a tuned adapter around the original middle and writes a Hugging Face checkpoint.

    An adapter of another model or split is refused, and with --owner one that was tuned in another
    bundle than the one shipped. How far each block has moved is printed,
    for the model owner to weigh.

    Example: gradot plug-in --model facebook/opt-1.3b --adapter tuned/adapter --owner
    opt-1.3b-offsite/owner --out opt-1.3b-tuned

    Attributes:
        model: the original: a checkpoint folder, or an id on the Hugging Face Hub.
        adapter: folder that the data owner returned.
        out: folder to make.
        owner: what compress wrote beside the bundle, to keep.
        revision: branch, tag or commit on the Hub.
        overwrite: replace an existing folder.
    """

    model: str
    adapter: Path
    out: Path
    owner: Path | None = None
    revision: str | None = None
    overwrite: bool = False

    def run(self) -> None:
        """Executes the command."""
        check_new(self.out, overwrite=self.overwrite)
        from gradot_jax.models.checkpoint import load_model, save_model
        from gradot_jax.models.split import AdapterSpec
        from gradot_jax.models.weight_files import checkpoint_folder
        from gradot_jax.offsite.adapter_file import adapter_report, check_adapter, load_adapter
        from gradot_jax.offsite.owner import load_bundle_digest, load_plan
        from gradot_jax.offsite.plug_in import plug_in

        folder = checkpoint_folder(self.model, self.revision)
        config, params = load_model(folder, dtype=None)
        adapter, manifest = load_adapter(self.adapter, config)
        split, digest = None, None
        if self.owner is not None:
            plan, digest = load_plan(self.owner), load_bundle_digest(self.owner)
            split = AdapterSpec(plan.num_bottom, plan.num_top, plan.inner)
        check_adapter(manifest, config, params, split=split, emulator_digest=digest)
        for change in adapter_report(config, params, adapter):
            print(
                f"layer {change.layer}: moved by {change.relative:.2%} of its norm, "
                f"largest change {change.largest:.3g}"
            )
        tuned = plug_in(params, adapter)
        save_model(self.out, config, tuned, tokenizer_from=folder, overwrite=self.overwrite)
        print(f"{self.out}: the tuned model")
