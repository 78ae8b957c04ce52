"""Files at the edge: canonical JSON of frozen values, strict reading, atomic writing."""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from profiles.errors import InvalidInputError, Problem

T = TypeVar("T")
MAX_FILE_BYTES = 64 << 20


def canonical_json(value: object) -> str:
    """Return `value` (a dataclass, mapping, sequence or scalar) as canonical JSON with a newline.

    Keys are sorted and NaN is refused, so equal values have equal bytes.

    >>> canonical_json({"b": (1, 2), "a": None})
    '{\\n "a": null,\\n "b": [\\n  1,\\n  2\\n ]\\n}\\n'
    """
    return json.dumps(plain(value), sort_keys=True, indent=1, allow_nan=False) + "\n"


def plain(value: object) -> Any:
    """Return `value` with dataclasses turned into dictionaries and tuples into lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def digest(value: object) -> str:
    """Return the SHA-256 of the canonical JSON of `value`, in hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all; raises what `write_bytes` raises."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` whole or not at all: a temporary file beside it, then a move.

    Raises InvalidInputError when the folder is missing or cannot be written.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise InvalidInputError(
            [f"{path}: cannot be written ({error.strerror}); name a file in a folder that exists"]
        ) from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink()
        raise


def read_text(path: Path, what: str) -> str:
    """Return the text of `path`, a `what` in the words of the user.

    Raises InvalidInputError for a file that is missing, too large, or not UTF-8.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidInputError([f"{path}: over {MAX_FILE_BYTES >> 20} MiB; not a {what}"])
        return path.read_text(encoding="utf-8")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InvalidInputError(
            [f"{path}: {reason}; name a {what} that exists and can be read"]
        ) from None
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            [f"{path}: not UTF-8 text ({error.reason}); not a {what}"]
        ) from None


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"key {twice[0]!r} stands twice in one object")
    return found


def read_json(path: Path, what: str) -> Any:
    """Return the JSON in `path`; NaN, infinities and duplicate keys are errors.

    Raises InvalidInputError that names the file and the place.
    """
    text = read_text(path, what)
    try:
        return json.loads(
            text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicates
        )
    except (ValueError, RecursionError) as error:
        raise InvalidInputError([f"{path}: not a {what}: {error}"]) from None


def from_plain(cls: type[T], data: Any, where: str, fix: str) -> T:
    """Return `data`, as `plain` made it, as a `cls`; every field is checked, none is coerced.

    Raises InvalidInputError with all problems: wrong types, missing and unknown keys.
    """
    from pydantic import TypeAdapter, ValidationError  # 30 ms of import, only for a file

    try:
        value: T = TypeAdapter(cls).validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise InvalidInputError(
            [
                Problem(
                    where=f"{where}: {'.'.join(map(str, problem['loc']))}",
                    found="missing"
                    if problem["type"] == "missing"
                    else json.dumps(problem["input"], default=str)[:60],
                    rule=f"must satisfy: {problem['msg'].lower()}",
                    fix=fix,
                )
                for problem in error.errors(include_url=False)
            ]
        ) from None
    if unknown := sorted(_unknown_keys(data, plain(value), "")):
        raise InvalidInputError([f"{where}: unknown key {key}; {fix}" for key in unknown])
    return value


def _unknown_keys(data: Any, known: Any, at: str) -> list[str]:
    if isinstance(data, dict) and isinstance(known, dict):
        extra = [f"{at}{key}" for key in data if key not in known]
        for key in data.keys() & known.keys():
            extra += _unknown_keys(data[key], known[key], f"{at}{key}.")
        return extra
    if isinstance(data, list) and isinstance(known, list):
        pairs = enumerate(zip(data, known, strict=False))
        return [key for i, (a, b) in pairs for key in _unknown_keys(a, b, f"{at}{i}.")]
    return []


def load(cls: type[T], path: Path, what: str, fix: str) -> T:
    """Return the value of class `cls` stored as JSON in `path`, a `what` in the user's words."""
    return from_plain(cls, read_json(path, what), str(path), fix)
