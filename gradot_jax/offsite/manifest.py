"""Manifests: the JSON file of a bundle or an adapter that says what the rest must be.

A manifest comes from the other party. Reading one trusts nothing: keys, types and ranges are
exact, and sizes agree with each other before any tensor is looked at.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, get_args

from gradot_jax.compression.plan import EmulatorSpec, HarmonizerShape, LayerShape
from gradot_jax.errors import InputError
from gradot_jax.models.families import read_config
from gradot_jax.models.family import ModelConfig, channel_count
from gradot_jax.models.split import AdapterSpec, LayerMap
from gradot_jax.nn.layout import maps

FORMAT_VERSION = 2
MIXED = "mixed"
"""Stands for a dtype where each tensor has its own."""

StoredDtype = Literal["float32", "float16", "bfloat16", "mixed"]

MAX_LAYERS = 4096
"""More than any model has; bounds the work that a hostile layer count can ask for."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_METHOD = re.compile(r"[A-Za-z0-9_.+-]{1,64}")
_NAME = re.compile(r"[A-Za-z0-9_.]{1,64}")
_WORD = re.compile(r"[A-Za-z0-9_.+-]{0,64}")
_OBJECTS = ("rope_parameters", "rope_scaling")
_WORDS = {"model_type", "architectures", "layer_types", "hidden_act", "activation_function"}
_WORDS |= {"dtype", "torch_dtype", "transformers_version", "rope_type", "type"}
_MAX_FIELDS = 512
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """What a manifest says of one file.

    Attributes:
        sha256: digest of the contents, hexadecimal.
        bytes: size.
    """

    sha256: str
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class BundleManifest:
    """The manifest of a bundle: shapes and digests, and no trace of what was left out.

    Attributes:
        config: of the full model.
        split: the blocks of the adapter.
        emulator: what the middle is: method, budgets, shapes of the compressed layers, layer map.
        dtype: of every stored array.
        base_digest: see `offsite.sealed_folder.base_digest`.
        files: every file of the folder but the manifest.
    """

    kind: ClassVar[str] = "gradot-bundle"

    config: ModelConfig
    split: AdapterSpec
    emulator: EmulatorSpec
    dtype: StoredDtype
    base_digest: str
    files: Mapping[str, FileRecord]

    def to_values(self) -> dict[str, Any]:
        """The contents of the manifest file."""
        spec = self.emulator
        return {
            **_common_values(self),
            "method": spec.method,
            "budget": {"attention": spec.attention_budget, "mlp": spec.mlp_budget},
            "middle": [_shape_values(shape) for shape in spec.shapes],
            "layer_map": list(spec.layer_map),
        }

    @classmethod
    def from_values(cls, values: Any, where: str) -> "BundleManifest":
        """Reads the contents of a manifest file, parsed; `where` names it in messages.

        Raises:
            InputError: when anything is missing, unknown, out of range or contradictory.
        """
        _check_format(values, cls.kind, where)
        _check_keys(values, {*_COMMON_KEYS, "method", "budget", "middle", "layer_map"}, where)
        common = _common_fields(values, where)
        config, split = common["config"], common["split"]
        budget = _check_keys(values["budget"], ("attention", "mlp"), f"{where}: budget")
        shapes = _shapes(values["middle"], config, split, where)
        emulator = EmulatorSpec(
            method=_text(values["method"], _METHOD, f"{where}: method"),
            attention_budget=_share(budget["attention"], f"{where}: budget attention"),
            mlp_budget=_share(budget["mlp"], f"{where}: budget mlp"),
            shapes=shapes,
            layer_map=_layer_map(values["layer_map"], len(shapes), config, split, where),
        )
        return cls(**common, emulator=emulator)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterManifest:
    """The manifest of a tuned adapter: which model and emulator it belongs to, and no more.

    Attributes:
        config: of the full model.
        split: the blocks of the adapter.
        dtype: of every stored array.
        base_digest: as in the bundle.
        emulator_digest: SHA-256 of the bundle's manifest, which has the digests of its files.
        files: every file of the folder but the manifest.
    """

    kind: ClassVar[str] = "gradot-adapter"

    config: ModelConfig
    split: AdapterSpec
    dtype: StoredDtype
    base_digest: str
    emulator_digest: str
    files: Mapping[str, FileRecord]

    def to_values(self) -> dict[str, Any]:
        """The contents of the manifest file."""
        return {**_common_values(self), "emulator_digest": self.emulator_digest}

    @classmethod
    def from_values(cls, values: Any, where: str) -> "AdapterManifest":
        """Reads the contents of a manifest file, see `BundleManifest.from_values`."""
        _check_format(values, cls.kind, where)
        _check_keys(values, {*_COMMON_KEYS, "emulator_digest"}, where)
        return cls(
            **_common_fields(values, where),
            emulator_digest=_text(values["emulator_digest"], _DIGEST, f"{where}: emulator_digest"),
        )


_COMMON_KEYS = ("format", "format_version", "config", "split", "dtype", "base_digest", "files")


def _common_values(manifest: BundleManifest | AdapterManifest) -> dict[str, Any]:
    return {
        "format": manifest.kind,
        "format_version": FORMAT_VERSION,
        "config": crossing_values(manifest.config.to_hf()),
        "split": {**dataclasses.asdict(manifest.split), "inner": list(manifest.split.inner)},
        "dtype": manifest.dtype,
        "base_digest": manifest.base_digest,
        "files": {name: dataclasses.asdict(record) for name, record in manifest.files.items()},
    }


def crossing_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a model's configuration that cross: plain data, of nobody's machine.

    Those are numbers, true, false and null, and lists of such; words under the names of `_WORDS`;
    and the objects of a rotary embedding. Under a name that begins with an underscore, only true
    and false cross.
    """
    return {name: value for name, value in values.items() if _crosses(name, value)}


def _crosses(name: Any, value: Any) -> bool:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return False
    if name.startswith("_"):
        return isinstance(value, bool)
    if isinstance(value, dict):
        return name in _OBJECTS and all(_crosses(*part) for part in value.items())
    parts = value if isinstance(value, list) else [value]
    plain = all(isinstance(part, bool | int | float | None) for part in parts)
    words = name in _WORDS and all(isinstance(p, str) and _WORD.fullmatch(p) for p in parts)
    return len(parts) <= MAX_LAYERS and (plain or words)


def _common_fields(values: dict[str, Any], where: str) -> dict[str, Any]:
    config = _config(values["config"], f"{where}: config")
    if values["dtype"] not in get_args(StoredDtype):
        raise InputError(
            f"{where}: dtype is {values['dtype']!r}, expected one of "
            f"{', '.join(get_args(StoredDtype))}"
        )
    return {
        "config": config,
        "split": _split(values["split"], config, f"{where}: split"),
        "dtype": values["dtype"],
        "base_digest": _text(values["base_digest"], _DIGEST, f"{where}: base_digest"),
        "files": _files(values["files"], f"{where}: files"),
    }


def _check_format(values: Any, kind: str, where: str) -> None:
    found = values.get("format") if isinstance(values, dict) else None
    if found != kind:
        raise InputError(f"{where}: format is {found!r}, expected {kind!r}")
    version = values.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise InputError(
            f"{where}: format_version is {version!r}, this program reads {FORMAT_VERSION}"
        )


def _check_keys(values: Any, expected: Iterable[str], where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected an object, got {type(values).__name__}")
    missing, unknown = sorted(set(expected) - set(values)), sorted(set(values) - set(expected))
    if missing or unknown:
        raise InputError(f"{where}: missing keys {missing}, unknown keys {unknown[:8]}")
    return values


def _text(value: Any, pattern: re.Pattern[str], where: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise InputError(f"{where}: {str(value)[:80]!r} does not match {pattern.pattern}")
    return value


def _integer(value: Any, low: int, high: int, where: str) -> int:
    if type(value) is not int or not low <= value <= high:
        raise InputError(f"{where}: {value!r:.80} is no whole number in [{low}, {high}]")
    return value


def _share(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not 0 < value <= 1:
        raise InputError(f"{where}: {value!r:.80} is no number in (0, 1]")
    return float(value)


def _config(values: Any, where: str) -> ModelConfig:
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected an object, got {type(values).__name__}")
    foreign = sorted(values.keys() - crossing_values(values).keys())
    if len(values) > _MAX_FIELDS:
        raise InputError(f"{where}: {len(values)} fields, expected at most {_MAX_FIELDS}")
    if foreign:
        raise InputError(f"{where}: unknown keys {foreign[:8]!r:.400}")
    config = read_config(values, where)
    _check_keys(values, config.to_hf(), where)
    differing = sorted(key for key, value in config.to_hf().items() if values[key] != value)
    if differing:
        raise InputError(
            f"{where}: not the values of an {config.family.label} model: {', '.join(differing)}"
        )
    _integer(config.num_hidden_layers, 1, MAX_LAYERS, f"{where}: num_hidden_layers")
    return config


def _split(values: Any, config: ModelConfig, where: str) -> AdapterSpec:
    _check_keys(values, ("num_bottom", "num_top", "inner"), where)
    bottom, top = (
        _integer(values[k], 0, MAX_LAYERS, f"{where}: {k}") for k in ("num_bottom", "num_top")
    )
    inner = values["inner"]
    if not isinstance(inner, list) or len(inner) > config.num_hidden_layers:
        raise InputError(f"{where}: inner must list at most {config.num_hidden_layers} layers")
    split = AdapterSpec(
        bottom, top, tuple(_integer(i, 0, MAX_LAYERS, f"{where}: inner") for i in inner)
    )
    try:
        split.check(config.num_hidden_layers)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return split


def _shapes(
    layers: Any, config: ModelConfig, split: AdapterSpec, where: str
) -> tuple[LayerShape | HarmonizerShape, ...]:
    most = config.num_hidden_layers - split.num_bottom - split.num_top
    if not isinstance(layers, list) or len(layers) > most:
        raise InputError(f"{where}: middle must list at most {most} layers")
    return tuple(_shape(layer, config, f"{where}: middle {j}") for j, layer in enumerate(layers))


def _layer_map(
    places: Any, num_stored: int, config: ModelConfig, split: AdapterSpec, where: str
) -> LayerMap:
    where = f"{where}: layer_map"
    most = config.num_hidden_layers - split.num_bottom - split.num_top
    if not isinstance(places, list) or len(places) > most:
        raise InputError(f"{where}: must list at most {most} places")
    if places.count(None) != len(split.inner):
        raise InputError(
            f"{where}: has {places.count(None)} places for inner blocks, the split has "
            f"{len(split.inner)}"
        )
    used, before = 0, None
    for place in places:
        if place is not None and (type(place) is not int or place != before):
            # Each layer's places are together, so that a small bundle is a small model.
            _integer(place, used, used, where)
            used += 1
        before = place
    if used != num_stored:
        raise InputError(f"{where}: uses {used} of {num_stored} stored layers")
    return tuple(places)


def _shape_values(shape: LayerShape | HarmonizerShape) -> dict[str, Any]:
    if isinstance(shape, HarmonizerShape):
        return {"harmonizer_rank": shape.rank}
    return {"ranks": dict(shape.ranks), "num_channels": shape.num_channels}


def _shape(layer: Any, config: ModelConfig, where: str) -> LayerShape | HarmonizerShape:
    if isinstance(layer, dict) and "harmonizer_rank" in layer:
        _check_keys(layer, ("harmonizer_rank",), where)
        rank = _integer(
            layer["harmonizer_rank"], 1, channel_count(config), f"{where}: harmonizer_rank"
        )
        return HarmonizerShape(rank=rank)
    _check_keys(layer, ("ranks", "num_channels"), where)
    block = config.family.block_shapes(config)
    sites, low_rank = maps(block), block.layout.low_rank
    ranks = _check_keys(layer["ranks"], low_rank, f"{where}: ranks")

    def rank(site: str) -> int | None:
        if ranks[site] is None:
            return None
        return _integer(ranks[site], 1, min(sites[site].shape), f"{where}: rank of {site}")

    most = sites[block.layout.channels.out].shape[0]
    channels = _integer(layer["num_channels"], 1, most, f"{where}: num_channels")
    return LayerShape(ranks=tuple((site, rank(site)) for site in low_rank), num_channels=channels)


def _files(values: Any, where: str) -> dict[str, FileRecord]:
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected an object, got {type(values).__name__}")
    records = {}
    for name, record in values.items():
        _text(name, _FILE_NAME, f"{where}: name")
        _check_keys(record, ("sha256", "bytes"), f"{where}: {name}")
        records[name] = FileRecord(
            sha256=_text(record["sha256"], _DIGEST, f"{where}: sha256 of {name}"),
            bytes=_integer(record["bytes"], 0, 2**62, f"{where}: bytes of {name}"),
        )
    return records
