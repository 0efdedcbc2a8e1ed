"""Results as JSON and back: one format for the report, lines and planes. Numbers keep their bits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, TypeVar

FORMAT = 1

Result = TypeVar("Result")
Kept = TypeVar("Kept", bound="Record")


class Record:
    """A dataclass of results that is kept as JSON: what it is called there, and how it is made of its content again."""

    KIND: ClassVar[str]

    def to_json(self, path: str | Path | None = None) -> str:
        """As JSON, which is also written to ``path`` if there is one. Numbers keep their bits; inf and NaN, which JSON does not
        know, are written as strings."""
        return write(self.KIND, asdict(self), path)  # type: ignore[call-overload]

    @classmethod
    def from_json(cls: type[Kept], source: str | Path) -> Kept:
        """What ``to_json`` gave, again: from the text, or from a path to it.

        Raises:
            OSError: there is no such file.
            TypeError: neither a text nor a path.
            ValueError: it is something else.
        """
        return read(cls.KIND, source, cls._of)

    @classmethod
    def _of(cls: type[Kept], content: dict[str, Any]) -> Kept:
        """From the JSON's content; any error says that it is something else."""
        raise NotImplementedError


def write(kind: str, content: Mapping[str, Any], path: str | Path | None) -> str:
    """The JSON, which is also written to the path if there is one. It knows no inf and no NaN: they become strings."""
    text = json.dumps({"record": kind, "format": FORMAT, **_plain(content)}, indent=2, allow_nan=False)
    if path is not None:
        Path(path).write_text(text + "\n", encoding="utf-8")
    return text


def read(kind: str, source: str | Path, build: Callable[[dict[str, Any]], Result]) -> Result:
    """What ``write`` has written: the text itself, or a path to it; ``build`` makes the result of its content.

    Raises:
        OSError: there is no such file.
        TypeError: neither a text nor a path.
        ValueError: it is something else.
    """
    if not isinstance(source, (str, Path)):
        raise TypeError(
            f"source: expected a {kind} as JSON or a path to one, got {type(source).__name__}: pass what to_json gave."
        )
    try:
        content = json.loads(_text(kind, source))
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"source: expected a {kind} as JSON, got something else ({error}): pass what to_json gave.") from None
    try:
        if content.pop("record") != kind or content.pop("format") != FORMAT:
            raise KeyError("format")
        return build(content)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"source: expected a {kind} of format {FORMAT}, got JSON with other entries: measure again.") from None


def floats(values: Iterable[Any]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _text(kind: str, source: str | Path) -> str:
    if isinstance(source, str) and source.lstrip()[:1] in ("{", "["):
        return source
    try:
        return Path(source).read_text(encoding="utf-8")
    except OSError as error:
        raise type(error)(
            f"source: expected a {kind} as JSON or a path to one, got {str(source)[:80]!r}, which cannot be read: pass what "
            "to_json gave, or where it was written."
        ) from None


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
