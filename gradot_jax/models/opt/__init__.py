"""OPT (Zhang et al. 2022): its configuration, its block, and the record of both."""

from gradot_jax.models.family import Family
from gradot_jax.models.opt import block
from gradot_jax.models.opt.config import OPTConfig

OPT = OPTConfig.family = Family(
    model_types=("opt",),
    label="OPT",
    read_config=OPTConfig.from_hf,
    layout=block.LAYOUT,
    layers_path="model.decoder.layers",
    shell_paths=block.SHELL_PATHS,
    canonical_name=block.canonical_name,
    block_shapes=block.block_shapes,
    shell_shapes=block.shell_shapes,
    init=block.init,
    embed=block.embed,
    project=block.project,
    finish=block.finish,
    final_norm=block.final_norm,
    head_operands=block.head_operands,
    describe=block.describe,
    begins_documents=True,
)
