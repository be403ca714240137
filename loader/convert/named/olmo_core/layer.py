"""One layer of a checkpoint, and the table that says what becomes of its keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from loader.errors import ConversionError

Table = dict[str, str | Callable[[], Tensor]]
"""By FQN within the block, a key within the layer, or what makes the tensor."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's keys, by their names within it."""

    checkpoint: Mapping[str, Tensor]
    prefix: str
    config: Any
    number: int
    dropless: bool

    def __getitem__(self, name: str) -> Tensor:
        return self.checkpoint[self.prefix + name]

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.checkpoint

    def has(self, option: str) -> bool:
        """Whether the config sets it: what a config does not name is off."""
        return getattr(self.config, option, None) not in (None, False)

    def flat(self, name: str) -> Tensor:
        return self[name].flatten()

    def experts(self, projection: str, count: str = "num_experts") -> list[Tensor]:
        """One projection of every expert; the config's `count` says how many there are. All of one shape."""
        names = [f"mlp.experts.{number}.{projection}.weight" for number in range(getattr(self.config, count))]
        parts = [self[name] for name in names]
        for name, part in zip(names, parts, strict=True):
            if part.shape != parts[0].shape:
                raise ConversionError(
                    f"key {self.prefix}{name} is {list(part.shape)}, while {self.prefix}{names[0]} is "
                    f"{list(parts[0].shape)}: the experts of a layer must be alike"
                )
        return parts
