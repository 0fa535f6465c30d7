"""Llama (Touvron et al. 2023) and its relatives Mistral, Qwen2 and Qwen3, in one block."""

from gradot_jax.models.family import Family
from gradot_jax.models.llama import block
from gradot_jax.models.llama.config import MODEL_TYPES, LlamaConfig

LLAMA = LlamaConfig.family = Family(
    model_types=MODEL_TYPES,
    label="Llama",
    read_config=LlamaConfig.from_hf,
    layout=block.LAYOUT,
    layers_path="model.layers",
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
)
