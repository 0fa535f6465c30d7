"""The plan, which stays with the model owner, and the part of it that ships: shapes, no indices."""

import dataclasses
import json
from itertools import pairwise
from typing import Any

from gradot_jax.compression.budget import check_budget
from gradot_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Shape of one compressed layer, all that is needed to rebuild its arrays.

    Attributes:
        ranks: `(site, R)` per low-rank site; R is None where the matrix stays dense.
        num_channels: hidden channels of the MLP.
    """

    ranks: tuple[tuple[str, int | None], ...]
    num_channels: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarmonizerShape:
    """Shape of a harmonizer.

    Attributes:
        rank: its width.
    """

    rank: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What one layer of the original keeps.

    Attributes:
        layer: index in the original model.
        components: `(site, kept indices)` per low-rank site, ascending, into the components in
            order of falling singular value; None where the matrix stays dense.
        channels: kept hidden channels of the MLP, ascending.
    """

    layer: int
    components: tuple[tuple[str, tuple[int, ...] | None], ...]
    channels: tuple[int, ...]

    @property
    def shape(self) -> LayerShape:
        """The layer's shape, without a trace of which indices were kept."""
        ranks = tuple((site, None if kept is None else len(kept)) for site, kept in self.components)
        return LayerShape(ranks=ranks, num_channels=len(self.channels))


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarmonizerPlan:
    """A layer of the original that a harmonizer stands in for.

    Attributes:
        layer: index in the original model.
        rank: width of the harmonizer.
    """

    layer: int
    rank: int

    @property
    def shape(self) -> HarmonizerShape:
        """The harmonizer's shape."""
        return HarmonizerShape(rank=self.rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmulatorSpec:
    """What ships of a plan: enough to rebuild the emulator's arrays, and no trace of what was kept.

    Attributes:
        method: name of the compression method.
        attention_budget: share asked for of the parameters outside the MLPs' channels.
        mlp_budget: share of the middle's MLP parameters asked for.
        shapes: of the emulator's stored middle layers, in depth order.
        layer_map: what runs where, see `models.split.LayerMap`.
    """

    method: str
    attention_budget: float
    mlp_budget: float
    shapes: tuple[LayerShape | HarmonizerShape, ...]
    layer_map: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a compression kept, and where.

    Attributes:
        method: name of the compression method.
        attention_budget: share asked for of the parameters outside the MLPs' channels.
        mlp_budget: share of the middle's MLP parameters asked for.
        num_bottom: blocks of the bottom adapter.
        num_top: blocks of the top adapter.
        inner: further adapter blocks, indices in the original model.
        layers: what the emulator stores of the middle, in depth order; a dropped layer has no
            entry.
        layer_map: what runs where, see `models.split.LayerMap`.
    """

    method: str
    attention_budget: float
    mlp_budget: float
    num_bottom: int
    num_top: int
    inner: tuple[int, ...]
    layers: tuple[LayerPlan | HarmonizerPlan, ...]
    layer_map: tuple[int | None, ...]

    @property
    def emulator(self) -> EmulatorSpec:
        """What ships."""
        return EmulatorSpec(
            method=self.method,
            attention_budget=self.attention_budget,
            mlp_budget=self.mlp_budget,
            shapes=tuple(layer.shape for layer in self.layers),
            layer_map=self.layer_map,
        )

    def to_json(self) -> str:
        """JSON that `from_json` turns back into an equal plan."""
        return json.dumps(
            {**dataclasses.asdict(self), "layers": [layer_values(layer) for layer in self.layers]}
        )

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Reads a plan.

        Raises:
            InputError: when the text is not a plan.
        """
        try:
            values = json.loads(text)
            layers = tuple(map(read_layer, values.pop("layers")))
            inner = _ascending("inner", values.pop("inner"))
            layer_map = tuple(values.pop("layer_map"))
            plan = cls(layers=layers, inner=inner, layer_map=layer_map, **values)
            _check_fields(plan)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"not a compression plan: {error}") from None
        return plan


def layer_values(layer: LayerPlan | HarmonizerPlan) -> dict[str, Any]:
    """One layer's plan as JSON values, which `read_layer` turns back."""
    if isinstance(layer, HarmonizerPlan):
        return dataclasses.asdict(layer)
    components = {site: None if kept is None else list(kept) for site, kept in layer.components}
    return {"layer": layer.layer, "components": components, "channels": list(layer.channels)}


def read_layer(values: dict[str, Any]) -> LayerPlan | HarmonizerPlan:
    """One layer's plan from JSON values.

    Raises:
        ValueError: when they are not a layer's plan; or KeyError, TypeError.
    """
    if "rank" in values:
        plan = HarmonizerPlan(**values)
        _ascending("harmonizer", [plan.layer])
        _ascending("rank of a harmonizer", [plan.rank])
        return plan
    components = tuple(
        (site, None if kept is None else _ascending(f"components of {site}", kept))
        for site, kept in values["components"].items()
    )
    channels = _ascending("channels", values["channels"])
    if values.keys() != {"layer", "components", "channels"}:
        raise ValueError(f"unknown keys in a layer: {sorted(values)}")
    return LayerPlan(layer=values["layer"], components=components, channels=channels)


def _check_fields(plan: Plan) -> None:
    layers = [layer.layer for layer in plan.layers]
    _ascending("layers", sorted(set(layers)))
    if layers != sorted(layers):
        raise ValueError(f"layers: expected depth order, got {layers!r:.80}")
    places = [place for place in plan.layer_map if place is not None]
    if not all(type(place) is int and 0 <= place < len(layers) for place in places):
        raise ValueError(f"layer_map: expected places of layers, got {plan.layer_map!r:.80}")
    for name in ("num_bottom", "num_top"):
        _ascending(name, [getattr(plan, name)])
    for name in ("attention_budget", "mlp_budget"):
        check_budget(name, getattr(plan, name))
    if not isinstance(plan.method, str):
        raise ValueError(f"method is {plan.method!r}, expected a name")


def _ascending(name: str, values: Any) -> tuple[int, ...]:
    indices = isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)
    if not indices or any(a >= b for a, b in pairwise(values)):
        raise ValueError(f"{name}: expected ascending indices, got {values!r:.80}")
    return tuple(values)
