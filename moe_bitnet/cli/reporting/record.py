"""Read JSON into dataclasses; an error names the file, the field and what is allowed there.

The dataclass is the schema: its field names are the JSON keys, its annotations the
allowed types. Keys that it does not name are ignored, fields with a default may be
absent. ``int`` means a count (whole, not negative); ``float`` takes NaN, infinities and
``null`` (how strict JSON stores them), since a diverged loss is a result, too.
"""

import json
import math
import re
import types
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from moe_bitnet.errors import DataError

Record = TypeVar("Record")
_MAX_COUNT = 2**63 - 1
# Terminal escapes and unpaired surrogates, which no UTF-8 file can hold. Tab and newline stay.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def read_record(kind: type[Record], path: Path) -> Record | None:
    """Read one JSON object into the dataclass ``kind``; ``None`` if there is no such file.

    Raises:
        DataError: the file is no JSON object of this kind.
    """
    if not path.exists():
        return None
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}). Run the step that writes it again.") from error
    return parse_record(kind, value, path)


def read_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Read JSON objects, one a line, as (line number, object).

    A last line that is cut off is ignored: its writer was killed.

    Raises:
        DataError: another line is no JSON object.
    """
    lines = [(number, line) for number, line in enumerate(_read_text(path).split("\n"), start=1) if line.strip()]
    objects: list[tuple[int, dict[str, Any]]] = []
    for number, line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == lines[-1][0]:
                break
            raise DataError(f"{path} line {number} is not valid JSON ({error}). Remove it or train again.") from error
        if not isinstance(value, dict):
            raise DataError(f"{path} line {number} holds {_show(value)}; one JSON object a line is expected.")
        objects.append((number, value))
    return objects


def parse_record(kind: type[Record], value: object, path: Path, field: str = "") -> Record:
    """Convert a JSON object that was read from ``path`` into the dataclass ``kind``.

    Raises:
        DataError: a field is absent or of another type.
    """
    if not isinstance(value, dict):
        raise _error(path, field, value, "a JSON object")
    assert is_dataclass(kind)
    hints = get_type_hints(kind)
    arguments: dict[str, Any] = {}
    for entry in fields(kind):
        name = f"{field}.{entry.name}" if field else entry.name
        if entry.name in value:
            arguments[entry.name] = _convert(hints[entry.name], value[entry.name], path, name)
        elif entry.default is MISSING:
            raise DataError(f"{path}: field {name!r} is missing. Run the step that writes this file again.")
    return kind(**arguments)


def _convert(kind: Any, value: object, path: Path, field: str) -> Any:
    if get_origin(kind) is types.UnionType:  # `X | None`: the field may be null
        if value is None:
            return None
        kind = next(option for option in get_args(kind) if option is not types.NoneType)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise _error(path, field, value, "a list")
        item_kind = get_args(kind)[0]
        return tuple(_convert(item_kind, item, path, f"{field}[{index}]") for index, item in enumerate(value))
    if get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise _error(path, field, value, "a JSON object")
        item_kind = get_args(kind)[1]
        return {clean_text(key): _convert(item_kind, item, path, f"{field}.{key}") for key, item in value.items()}
    if is_dataclass(kind):
        return parse_record(kind, value, path, field)  # type: ignore[arg-type]
    return _convert_scalar(kind, value, path, field)


def _convert_scalar(kind: Any, value: object, path: Path, field: str) -> Any:
    if kind is Any:
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise _error(path, field, value, "true or false")
        return value
    if kind is str:
        if not isinstance(value, str):
            raise _error(path, field, value, "a text")
        return clean_text(value)
    if kind is float and value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _error(path, field, value, "a number")
    if kind is float:
        return float(value) if abs(value) <= _MAX_COUNT or isinstance(value, float) else math.inf
    if not math.isfinite(value) or value != int(value) or not 0 <= value <= _MAX_COUNT:
        raise _error(path, field, value, "a whole number of 0 or more")
    return int(value)


def clean_text(text: str) -> str:
    """Replace what neither a terminal nor a UTF-8 file should receive (control codes, unpaired surrogates)."""
    return _UNPRINTABLE.sub("�", text.replace("\r\n", "\n"))


def to_strict_json(value: Any) -> Any:
    """Replace NaN and infinities by ``None``, tuples by lists; JSON knows neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, dict):
        return {clean_text(str(key)): to_strict_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_strict_json(item) for item in value]
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). Check the path and its permissions.") from error


def _error(path: Path, field: str, value: object, allowed: str) -> DataError:
    place = f"field {field!r}" if field else "the file"
    return DataError(f"{path}: {place} holds {_show(value)}; expected {allowed}. Run the step that writes it again.")


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
