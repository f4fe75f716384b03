"""The list of a checkpoint's files with their sizes and SHA-256 sums, so that damage is found before use.

It finds truncation and accidental change. It does not prove who wrote the files.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_bitnet.errors import CheckpointError
from moe_bitnet.files import read_json, recover_directory

MANIFEST_NAME = "manifest.json"


def write_manifest(folder: Path, known_sums: Mapping[str, str] | None = None) -> None:
    """List every file of ``folder`` in its ``manifest.json``; files whose SHA-256 is known are not read."""
    known = known_sums or {}
    files = {
        file.name: {"num_bytes": file.stat().st_size, "sha256": known.get(file.name) or _sha256(file)}
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name != MANIFEST_NAME
    }
    (folder / MANIFEST_NAME).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")


def verify_manifest(folder: Path, required: Sequence[str] = ()) -> None:
    """Check that a checkpoint is whole.

    Args:
        folder: of the checkpoint.
        required: names that the manifest must list.
    Raises:
        CheckpointError: the folder or a listed file is missing, truncated or altered.
    """
    recover_directory(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: there is no such checkpoint folder. Give a folder that holds {MANIFEST_NAME}."
        )
    path = folder / MANIFEST_NAME
    try:
        listed = read_json(path)["files"]
        expected = {str(name): (int(entry["num_bytes"]), str(entry["sha256"])) for name, entry in listed.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: is not a checkpoint of this package; it has no {MANIFEST_NAME}.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}: is damaged ({error!r}). Save the model again.") from error
    unlisted = sorted(set(required) - expected.keys())
    if unlisted:
        raise CheckpointError(f"{path}: does not list {', '.join(unlisted)}. The file was altered; copy it again.")
    for name, (num_bytes, sha256) in expected.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{folder}: {name} is missing. Copy the whole folder, or save the model again.")
        if file.stat().st_size != num_bytes:
            raise CheckpointError(
                f"{file}: has {file.stat().st_size} bytes, {num_bytes} were written: the file is truncated or altered. "
                f"Copy it again, or save the model again."
            )
        if _sha256(file) != sha256:
            raise CheckpointError(
                f"{file}: its content was altered after saving. Copy it again, or save the model again."
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
