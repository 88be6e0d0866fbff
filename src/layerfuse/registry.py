"""One table from a name to a (config, module) pair."""

from collections.abc import Callable
from typing import Generic, TypeVar

Config = TypeVar("Config")
Module = TypeVar("Module")


class Registry(Generic[Config, Module]):
    """Maps a strategy's name to its config class and its module class."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._pairs: dict[str, tuple[type[Config], type[Module]]] = {}

    def register(self, name: str, config: type[Config]) -> Callable[[type[Module]], type[Module]]:
        """Class decorator: register the decorated module under `name` with its config class.

        Raises ValueError if the name is taken by another class.
        """

        def add(module: type[Module]) -> type[Module]:
            known = self._pairs.get(name)
            if known is not None and known[1].__qualname__ != module.__qualname__:
                raise ValueError(f"{self.what} {name!r} is already registered as {known[1]}")
            self._pairs[name] = (config, module)
            return module

        return add

    def names(self) -> list[str]:
        """The registered names, in order of registration."""
        return list(self._pairs)

    def __getitem__(self, name: str) -> tuple[type[Config], type[Module]]:
        """The pair under `name`. Raises ValueError listing the valid names."""
        if name not in self._pairs:
            raise ValueError(f"unknown {self.what} {name!r}; valid: {', '.join(self.names())}")
        return self._pairs[name]
