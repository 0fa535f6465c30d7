"""Hugging Face checkpoints of OPT models, read and written without torch."""

import json
from pathlib import Path

import numpy as np

from gradot_jax.files.tensors import write_tensors
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.names import block_to_hf, layer_prefix, shell_to_hf
from gradot_jax.models.opt.params import Params, unstack_blocks


def save_opt(path, config: OPTConfig, params: Params, *, dtype=None, overwrite=False) -> None:
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = dict(shell_to_hf(params.shell))
    for layer, block in enumerate(unstack_blocks(params.segments)):
        tensors |= {layer_prefix(layer) + name: array for name, array in block_to_hf(block)}
    if dtype:
        tensors = {k: v.astype(np.dtype(dtype)) for k, v in tensors.items()}
    write_tensors(path / "model.safetensors", tensors, {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config.to_hf() | {"dtype": dtype}, indent=2))
