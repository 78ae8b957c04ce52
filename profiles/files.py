"""Files at the edge: canonical JSON of frozen values, strict reading, atomic writing."""

import dataclasses
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from profiles.errors import InvalidInputError, Problem

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

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

    Raises InvalidInputError when the folder is missing or cannot be written, and for a `path` that
    is something else than a file.
    """
    temporary = _beside(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _unwritable(path, error) from None
        raise


def check_writable(path: Path) -> None:
    """Raise what `write_bytes` would raise at `path`: asked before work that takes long."""
    _beside(path).unlink()


def _beside(path: Path) -> Path:
    """Return a new file in the folder of `path`, which is a file or nothing yet."""
    try:
        # A move would put a file in the place of a device such as /dev/null.
        if path.exists() and not path.is_file():
            raise InvalidInputError([f"{path}: is a folder or a device; name a file"])
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise _unwritable(path, error) from None
    os.close(handle)
    return Path(temporary)


def _unwritable(path: Path, error: OSError) -> InvalidInputError:
    reason = (error.strerror or str(error)).lower()
    return InvalidInputError(
        [f"{path}: cannot be written ({reason}); name a file in a folder that exists"]
    )


def read_text(path: Path, what: str) -> str:
    """Return the text of `path`, a `what` in the words of the user.

    Raises InvalidInputError for a file that is missing, too large, or not UTF-8.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidInputError([f"{path}: over {MAX_FILE_BYTES >> 20} MiB; not a {what}"])
        return path.read_text(encoding="utf-8-sig")  # some editors write a mark in front
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


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is too large")
    return value


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
            text, parse_float=_finite, parse_constant=_refuse_constant,
            object_pairs_hook=_refuse_duplicates,
        )  # fmt: skip
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
        problems = error.errors(include_url=False)
        known = TypeAdapter(cls).json_schema().get("properties", {})
        if not isinstance(data, dict) or len(data.keys() & known) < len(known) / 2:
            raise InvalidInputError([f"{where}: holds no {cls.__name__}; {fix}"]) from None
        raise InvalidInputError([_problem(problem, where, fix) for problem in problems]) from None
    if unknown := sorted(_unknown_keys(data, plain(value), "")):
        raise InvalidInputError([f"{where}: unknown key {key}; {fix}" for key in unknown])
    return value


def _problem(problem: "ErrorDetails", where: str, fix: str) -> Problem:
    is_missing = problem["type"] == "missing"
    return Problem(
        where=f"{where}: {'.'.join(map(str, problem['loc']))}",
        found="missing" if is_missing else json.dumps(problem["input"], default=str)[:60],
        rule="must be given" if is_missing else f"must satisfy: {problem['msg'].lower()}",
        fix=fix,
    )


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
