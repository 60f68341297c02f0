"""Types of parameters that several verbs share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter

from quire.sizes import parse_size

__all__ = ["Flag", "Size"]


def size_of_tokens(_type: Any, tokens: Sequence[Any]) -> int:
    """The bytes that an argument such as `64MiB` means."""
    return parse_size(tokens[0].value)


Size = Annotated[int, Parameter(converter=size_of_tokens, metavar="SIZE", show_default=False)]
Flag = Annotated[bool, Parameter(negative=())]
