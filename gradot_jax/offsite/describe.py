"""Describing a folder: what a bundle, an adapter or a checkpoint holds, without loading it."""

from pathlib import Path

from gradot_jax.compression.plan import HarmonizerShape
from gradot_jax.errors import InputError
from gradot_jax.models.checkpoint import load_config
from gradot_jax.offsite.adapter_file import read_adapter_manifest
from gradot_jax.offsite.bundle import read_bundle_manifest
from gradot_jax.offsite.card import count_parameters, trained_blocks
from gradot_jax.offsite.manifest import AdapterManifest, BundleManifest
from gradot_jax.offsite.sealed_folder import MANIFEST, digest_matches, read_manifest


def describe(path: str | Path) -> dict[str, str]:
    """What a folder holds, as labels and values fit for a terminal.

    The digest of each listed file is computed and compared; a difference is reported and raises
    nothing, so that a damaged folder can be looked at. No tensor is read.

    Raises:
        InputError: when it is no bundle, no adapter and no Hugging Face checkpoint.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if (folder / MANIFEST).is_file():
        lines = _describe_sealed(folder)
    elif (folder / "config.json").is_file():
        lines = _describe_checkpoint(folder)
    else:
        raise InputError(f"{folder}: neither a bundle, an adapter nor a Hugging Face checkpoint")
    return {printable(label): printable(value) for label, value in lines.items()}


def printable(text: str) -> str:
    """A text with its control and other unprintable characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _describe_sealed(folder: Path) -> dict[str, str]:
    values, _ = read_manifest(folder)
    if values.get("format") == AdapterManifest.kind:
        adapter = read_adapter_manifest(folder)
        return {
            "kind": "tuned adapter",
            **_describe_common(adapter),
            "tuned in bundle": adapter.emulator_digest,
            **_describe_files(folder, adapter),
        }
    bundle, digest = read_bundle_manifest(folder)
    counts, spec = count_parameters(bundle), bundle.emulator
    return {
        "kind": "emulator bundle",
        **_describe_common(bundle),
        "method": spec.method,
        "budget": f"attention {spec.attention_budget:g}, MLP {spec.mlp_budget:g}",
        "parameters": f"{counts.shipped:,} of the original's {counts.original:,}",
        "shipped unchanged": f"{counts.unchanged / counts.original:.1%} of the original's",
        **_describe_middle(bundle),
        "bundle digest": digest,
        **_describe_files(folder, bundle),
    }


def _describe_common(manifest: BundleManifest | AdapterManifest) -> dict[str, str]:
    return {
        "model": manifest.config.family.describe(manifest.config),
        "split": f"{trained_blocks(manifest.split)} are trained",
        "dtype": manifest.dtype,
        "base digest": manifest.base_digest,
    }


def _describe_middle(manifest: BundleManifest) -> dict[str, str]:
    def shape(layer) -> str:
        if isinstance(layer, HarmonizerShape):
            return f"harmonizer of rank {layer.rank}"
        ranks = (f"{site} {'dense' if rank is None else rank}" for site, rank in layer.ranks)
        return f"{', '.join(ranks)}, channels {layer.num_channels}"

    layers = {f"middle {j}": shape(layer) for j, layer in enumerate(manifest.emulator.shapes)}
    if manifest.emulator.layer_map == tuple(range(len(layers))):
        return layers
    places = ("adapter" if place is None else str(place) for place in manifest.emulator.layer_map)
    return layers | {"layer map": " ".join(places)}


def _describe_files(folder: Path, manifest: BundleManifest | AdapterManifest) -> dict[str, str]:
    files = {
        f"file {name}": f"{record.bytes:,} bytes, "
        + ("digest verified" if digest_matches(folder, name, record) else "DIGEST DIFFERS")
        for name, record in manifest.files.items()
    }
    extra = sorted({path.name for path in folder.iterdir()} - {MANIFEST, *manifest.files})
    return files | {f"file {name}": "NOT LISTED" for name in extra}


def _describe_checkpoint(folder: Path) -> dict[str, str]:
    config = load_config(folder)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {
        "kind": "Hugging Face checkpoint",
        "model": config.family.describe(config),
        **{f"file {path.name}": f"{path.stat().st_size:,} bytes, no digest" for path in files},
    }
