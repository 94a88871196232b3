"""Files that are written whole or not at all, and read without ever running code from them.

Tensors live in safetensors files whose one metadata entry, ``sferd_lab``, is a JSON object that says what they are. Nothing here
or elsewhere in the package loads a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sferd_lab.errors import SferdError

METADATA_KEY = "sferd_lab"


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well, and is removed when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as JSON with sorted keys, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """The value in a JSON file. Raises SferdError when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SferdError(f"{path} is missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise SferdError(f"{path} is not JSON: {error}") from None


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write ``tensors`` and the JSON-able ``info`` to one safetensors file, whole or not at all.

    The same input gives the same bytes.
    """
    # A single metadata entry, since safetensors does not keep the order of several.
    metadata = {METADATA_KEY: json.dumps(info, sort_keys=True, allow_nan=False)}
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def load_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The (tensors, info) of a file made by ``save_tensors``. Raises SferdError when it is missing, altered or of another kind."""
    if not Path(path).is_file():
        raise SferdError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            info = json.loads((file.metadata() or {})[METADATA_KEY])
            # Clones, since what safe_open gives is a view of the file: changing the file would change it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except KeyError:
        raise SferdError(f"{path} was not written by sferd_lab: its metadata has no '{METADATA_KEY}' entry") from None
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise SferdError(f"{path} is not a readable safetensors file: {error}") from None
    if not isinstance(info, dict):
        raise SferdError(f"{path}: the '{METADATA_KEY}' metadata is {type(info).__name__}; expected an object")
    return tensors, info


def project_folder() -> Path:
    """The clone that this package is used from (it holds a pyproject.toml), else the current folder."""
    clone = Path(__file__).resolve().parent.parent
    return clone if (clone / "pyproject.toml").is_file() else Path.cwd()


def sha256(path: Path | str) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
