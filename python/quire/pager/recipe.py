"""How a store travels to the pager process: pickled, with the import path of its parent."""

from __future__ import annotations

import importlib.util
import pickle
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from quire.errors import SourceError

if TYPE_CHECKING:
    from quire.store.abc import Store

__all__ = ["Recipe", "command", "encode_recipe", "open_recipe"]


class Recipe(Protocol):
    """What opens a store in the pager process; must be picklable."""

    @property
    def label(self) -> str:
        """What errors call the source; never holds a credential."""

    def open(self) -> Store:
        """Opens the store. Called once in each pager process.

        Raises:
            quire.SourceError: the source cannot be opened; the message says what to do next.
        """


@dataclass(frozen=True)
class Parcel:
    """The pickled recipe or store, and the import path to unpickle it with."""

    import_path: tuple[str, ...]
    payload: bytes


def command() -> list[str]:
    """The program and arguments that start a pager process, before the core's own arguments.

    The interpreter's flags that change how modules are found are handed on, and the current
    directory is kept out of the import path: a ``json.py`` there must not break the pager.
    """
    flags = [
        flag
        for flag, wanted in (
            ("-I", sys.flags.isolated),
            ("-E", sys.flags.ignore_environment and not sys.flags.isolated),
            ("-s", sys.flags.no_user_site and not sys.flags.isolated),
            ("-S", sys.flags.no_site),
        )
        if wanted
    ]
    return [sys.executable, "-P", *flags, "-m", "quire.pager"]


def encode_recipe(source: Recipe | Store) -> bytes:
    """The bytes that make ``source`` in a pager process.

    A class of ``__main__`` or one defined inside a function is sent by value, which needs
    ``cloudpickle``.

    Raises:
        quire.SourceError: it cannot be pickled.
    """
    label = str(getattr(source, "label", type(source).__name__))
    kind = type(source)
    by_value = kind.__module__ == "__main__" or "<locals>" in kind.__qualname__
    if by_value and importlib.util.find_spec("cloudpickle") is None:
        raise SourceError(
            f"the class {kind.__qualname__} is defined in {kind.__module__}, which its pager "
            "process cannot import: move it to a module of its own, or install cloudpickle "
            "(`pip install cloudpickle`)",
            source=label,
        )
    try:
        if by_value:
            import cloudpickle

            payload: bytes = cloudpickle.dumps(source)
        else:
            payload = pickle.dumps(source, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        raise SourceError(
            f"the store cannot be sent to its pager process: {type(error).__name__}: {error}; "
            "keep only what can be pickled in it and open files and connections in read_into",
            source=label,
        ) from error
    return pickle.dumps(Parcel(tuple(sys.path), payload), protocol=pickle.HIGHEST_PROTOCOL)


def open_recipe(data: bytes) -> Store:
    """The open store of what `encode_recipe` made; changes this process's import path.

    Raises:
        quire.SourceError: its class cannot be imported here.
        Exception: whatever the recipe's ``open`` raises.
    """
    parcel: Parcel = pickle.loads(data)
    sys.path[:] = parcel.import_path
    try:
        source = pickle.loads(parcel.payload)
    except (ImportError, AttributeError) as error:
        raise SourceError(
            f"the pager process cannot import the store's class: {error}; move it to a module "
            "that can be imported by name, or install cloudpickle (`pip install cloudpickle`)"
        ) from error
    opened: Store = source.open() if hasattr(source, "open") else source
    return opened
