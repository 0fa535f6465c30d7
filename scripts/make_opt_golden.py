"""Makes the golden files of the OPT tests with two independent implementations.

The files are what Hugging Face's own code wrote, of tiny models whose every parameter is random
(norm gains, biases and positions included), so that no transposed square matrix and no forgotten
bias goes unnoticed. The tests read them without torch and without the Flax models, which
transformers dropped with version 5. Each mode runs in an environment of its own:

    pip install "transformers>=5" torch numpy
    python scripts/make_opt_golden.py torch tests/models/opt/golden

    pip install "transformers==4.57.6" "jax==0.10.2" flax safetensors
    python scripts/make_opt_golden.py flax tests/models/opt/golden

First torch: per variant a folder with `config.json`, `model.safetensors` and `torch.npz`
(`input_ids`, `attention_mask`, `logits`). Then flax, on the same weights: `flax.npz` (`logits`),
and of two variants `flax/` and `flax_sharded/` as `save_pretrained` writes them. The flax mode
checks that both implementations agree before it writes; HF Flax ignores `enable_bias` and
`layer_norm_elementwise_affine`, so two variants have torch logits only.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np

BASE = {
    "vocab_size": 23,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "ffn_dim": 12,
    "num_attention_heads": 2,
    "max_position_embeddings": 10,
    "word_embed_proj_dim": 8,
}
VARIANTS = {
    "pre_ln": {},
    "post_ln_projection": {"do_layer_norm_before": False, "word_embed_proj_dim": 6},
    "no_final_norm": {"_remove_final_layer_norm": True},
    "untied": {"tie_word_embeddings": False},
    "no_bias": {"enable_bias": False},
    "no_affine": {"layer_norm_elementwise_affine": False},
    "gelu": {"activation_function": "gelu"},
}
NOT_IN_FLAX = ("no_bias", "no_affine")
WITH_MSGPACK = ("pre_ln", "post_ln_projection")


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask `[3, 7]`: a full row, one padded on the right, one on the left."""
    ids = np.random.default_rng(7).integers(3, BASE["vocab_size"], (3, 7))
    mask = np.ones_like(ids)
    mask[1, 4:] = 0
    mask[2, :3] = 0
    return np.where(mask, ids, 1), mask


def make_torch(root: Path) -> None:
    """Writes configuration, random weights and logits of every variant."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    ids, mask = inputs()
    for seed, (variant, changes) in enumerate(VARIANTS.items()):
        torch.manual_seed(seed)
        config = OPTConfig(**{**BASE, **changes}, attn_implementation="eager")
        model = OPTForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            gain = name.endswith("norm.weight")
            parameter.data = torch.randn_like(parameter) * (0.3 if gain else 0.5) + float(gain)
        with torch.no_grad():
            logits = model(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
        shutil.rmtree(root / variant, ignore_errors=True)
        model.save_pretrained(root / variant)
        (root / variant / "model.safetensors").chmod(0o644)
        (root / variant / "generation_config.json").unlink(missing_ok=True)
        arrays = {"input_ids": ids, "attention_mask": mask, "logits": logits.numpy()}
        np.savez_compressed(root / variant / "torch.npz", **arrays)


def make_flax(root: Path) -> None:
    """Writes logits, and for some variants weights, of HF Flax on the weights torch left."""
    from safetensors.numpy import load_file
    from transformers import FlaxOPTForCausalLM, OPTConfig

    ids, mask = inputs()
    for variant in (name for name in VARIANTS if name not in NOT_IN_FLAX):
        folder = root / variant
        config = OPTConfig.from_pretrained(folder)
        model = FlaxOPTForCausalLM(config, input_shape=(1, 4))
        model.params = nested(load_file(folder / "model.safetensors"))
        logits = np.asarray(model(ids, attention_mask=mask).logits)
        expected = np.load(folder / "torch.npz")["logits"]
        np.testing.assert_allclose(logits[mask == 1], expected[mask == 1], atol=2e-5)
        np.savez_compressed(folder / "flax.npz", logits=logits)
        if variant in WITH_MSGPACK:
            for name, size in (("flax", "1GB"), ("flax_sharded", "3KB")):
                shutil.rmtree(folder / name, ignore_errors=True)
                model.save_pretrained(folder / name, max_shard_size=size)
                (folder / name / "generation_config.json").unlink(missing_ok=True)


def nested(tensors: dict[str, np.ndarray]) -> dict:
    """Torch tensors as the parameter tree of HF Flax."""
    tree: dict = {}
    for name, array in tensors.items():
        *parents, leaf = name.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        if leaf == "weight" and parents[-1].startswith("embed"):
            leaf = "embedding"
        elif leaf == "weight":
            leaf = "kernel" if array.ndim == 2 else "scale"
        node[leaf] = array.T if leaf == "kernel" else array
    return tree


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=("torch", "flax"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    {"torch": make_torch, "flax": make_flax}[arguments.mode](arguments.folder)
