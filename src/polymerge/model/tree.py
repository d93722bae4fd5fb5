"""Where modules and parameters are in a model. Knows names and identities; does not know bundles."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .watch import kind_of


class Tree:
    """Where modules and parameters are in the model, as it was before anything was replaced. One may be in many
    places."""

    def __init__(self, hf: nn.Module) -> None:
        self.modules = dict(hf.named_modules(remove_duplicate=False))
        self._names: dict[int, list[str]] = {}
        self._places: dict[int, list[tuple[str, str]]] = {}
        for name, module in self.modules.items():
            self._names.setdefault(id(module), []).append(name)
            for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None and self._names[id(module)] == [name]:
                    self._places.setdefault(id(tensor), []).append((name, leaf))

    def places(self, tensor: Tensor) -> list[tuple[str, str]]:
        """(module, name) of everything that holds this parameter."""
        return self._places[id(tensor)]

    def replace(self, name: str, module: nn.Module) -> None:
        """Puts a module in all places of another."""
        replaced = self.modules[name]
        for attribute, value in vars(replaced).items():  # what its users ask it: in_features and the like
            if isinstance(value, int | float | str) and attribute not in vars(module):
                setattr(module, attribute, value)
        for place in self._names[id(replaced)]:
            parent, _, leaf = place.rpartition(".")
            owner: Any = self.modules[parent]
            setattr(owner, leaf, module)

    def around(self, name: str, kind: str) -> str | None:
        """The module of that kind that holds this one, or is it; None where this one is reached by other ways too."""
        ways = [self._above(place, kind) for place in self._names[id(self.modules[name])]]
        first = ways[0]
        same = first is not None and all(way and self.modules[way] is self.modules[first] for way in ways)
        return first if same else None

    @staticmethod
    def _above(name: str, kind: str) -> str | None:
        while name and kind_of(name) != kind:
            name = name.rpartition(".")[0]
        return name or None


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    parameter = module._parameters.get(name)
    return parameter if parameter is not None else module._buffers.get(name)
