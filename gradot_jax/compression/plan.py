"""The plan: what each layer keeps. Indices stay with the owner; shapes go with the bundle."""

import dataclasses
import json
from typing import Any

from gradot_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Shape of one compressed layer, all that is needed to rebuild its arrays.

    Attributes:
        ranks: `(site, R)` per attention site; R is None where the matrix stays dense.
        num_channels: hidden channels of the MLP.
    """

    ranks: tuple[tuple[str, int | None], ...]
    num_channels: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What one layer of the original keeps.

    Attributes:
        layer: index in the original model.
        components: `(site, kept indices)` per attention site, ascending, into the components in
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
class Plan:
    """The outcome of a compression, from which the emulator can be rebuilt.

    Attributes:
        method: name of the compression method.
        attention_budget: share of the middle's attention parameters asked for.
        mlp_budget: share of the middle's MLP parameters asked for.
        num_bottom: blocks of the bottom adapter.
        num_top: blocks of the top adapter.
        layers: the emulator's middle, in depth order; a dropped layer has no entry.
    """

    method: str
    attention_budget: float
    mlp_budget: float
    num_bottom: int
    num_top: int
    layers: tuple[LayerPlan, ...]

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """Shapes of the emulator's middle layers."""
        return tuple(layer.shape for layer in self.layers)

    def to_json(self) -> str:
        """JSON that `from_json` turns back into an equal plan."""
        values: dict[str, Any] = dataclasses.asdict(self)
        for layer in values["layers"]:
            layer["components"] = dict(layer["components"])
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Reads a plan.

        Raises:
            InputError: when the text is not a plan.
        """
        try:
            values = json.loads(text)
            layers = tuple(
                LayerPlan(
                    layer=layer["layer"],
                    components=tuple(
                        (site, None if kept is None else tuple(kept))
                        for site, kept in layer["components"].items()
                    ),
                    channels=tuple(layer["channels"]),
                )
                for layer in values.pop("layers")
            )
            return cls(layers=layers, **values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"not a compression plan: {error}") from None
