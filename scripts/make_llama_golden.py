"""Makes the golden files of the Llama tests with Hugging Face's torch models.

Tiny models whose every parameter is random (gains and biases included), one per variant of
configuration, run on sequences longer than what their rotary embeddings were trained on and than
their sliding windows; one sequence is padded on the right. The tests read the files without torch.

    pip install "transformers>=5" torch numpy
    python scripts/make_llama_golden.py tests/models/llama/golden

Per variant a folder with `config.json`, `model.safetensors` and `torch.npz` (`input_ids`,
`attention_mask`, `logits`).
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

BASE = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
}
STRETCHED = {"factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {"rope_type": "llama3", **STRETCHED, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", **STRETCHED}
MIXED = ["full_attention", "sliding_attention", "full_attention"]
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "llama_dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0},
        "max_position_embeddings": 8,
    },
    "llama_llama3": {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}},
    "llama_yarn": {"rope_parameters": YARN},
    "llama_yarn_mscale": {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
    "llama_yarn_whole": {"rope_parameters": {**YARN, "truncate": False, "rope_theta": 100.0}},
    "llama_grouped": {"num_key_value_heads": 2},
    "llama_one_key": {"num_key_value_heads": 1},
    "llama_biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
    "llama_head_dim": {"head_dim": 6, "num_key_value_heads": 2},
    "llama_tied": {"tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 5},
    "mistral_full": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2},
    "qwen2_window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 6},
    "qwen3_window": {
        "model_type": "qwen3",
        "head_dim": 4,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": MIXED,
    },
}
OLD_FORM = {"llama_linear": "type", "llama_llama3": "rope_type", "mistral": None}
"""Variants whose `config.json` is written as before version 5, with the name of the kind."""


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask `[2, 25]`: a full row, and one padded on the right."""
    ids = np.random.default_rng(7).integers(4, BASE["vocab_size"], (2, 25))
    mask = np.ones_like(ids)
    mask[1, 20:] = 0
    return np.where(mask, ids, 0), mask


def make(root: Path) -> None:
    """Writes configuration, random weights and logits of every variant."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    ids, mask = inputs()
    for seed, (variant, changes) in enumerate(VARIANTS.items()):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(**{"model_type": "llama", **BASE, **changes})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for name, parameter in model.named_parameters():
            gain = name.endswith("norm.weight")
            parameter.data = torch.randn_like(parameter) * (0.3 if gain else 0.4) + float(gain)
        with torch.no_grad():
            logits = model(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
        folder = root / variant
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        (folder / "model.safetensors").chmod(0o644)
        (folder / "generation_config.json").unlink(missing_ok=True)
        if variant in OLD_FORM:
            to_old_form(folder / "config.json", OLD_FORM[variant])
        arrays = {"input_ids": ids, "attention_mask": mask, "logits": logits.numpy()}
        np.savez_compressed(folder / "torch.npz", **arrays)


def to_old_form(file: Path, kind: str | None) -> None:
    """Rewrites a `config.json` with `rope_theta` and `rope_scaling` beside each other."""
    values = json.loads(file.read_text())
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    own = rope.pop("rope_type")
    values["rope_scaling"] = None if kind is None else {kind: own, **rope}
    values["torch_dtype"] = values.pop("dtype")
    file.write_text(json.dumps(values, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    make(parser.parse_args().folder)
