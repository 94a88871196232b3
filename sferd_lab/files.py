"""Files that are written whole or not at all, and read without ever running code from them; and folders that one process works in.

Tensors live in safetensors files whose one metadata entry, ``sferd_lab``, is JSON: the SHA-256 of all that the file holds, and an object
that says what it is. The first is a checksum against damage, not a signature. Nothing here or elsewhere in the package loads a pickle.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
import yaml
from filelock import FileLock, SoftFileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sferd_lab.errors import SferdError

METADATA_KEY = "sferd_lab"
# What a system call answers where the file system has no locks.
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well, and is removed when it does not.

    Raises SferdError, with what is free there, when the disk is full or the folder cannot be written to: what was there stays as it was.
    """
    path = Path(path)
    try:
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
            # A disk that has become unwritable keeps it; an error of this line would hide why.
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno is None:  # not the system's
            raise
        raise SferdError(f"cannot write {path}: {error.strerror}{_free(path)}; what was there before is as it was") from error


def _free(path: Path) -> str:
    """How much room there is for ``path``, as the end of a sentence."""
    folder = next((parent for parent in path.absolute().parents if parent.is_dir()), None)
    return f" ({shutil.disk_usage(folder).free / 2**20:,.1f} MiB free in {folder})" if folder else ""


class FolderLock:
    """While it lives no other process can have one on ``folder``: made by ``work_in``, and gone with its last user or with the process.

    The lock is the operating system's, so one whose process has died is free. Raises SferdError when another process has it, naming that
    one, and where the file system has no locks.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path, owner = folder, folder / ".working.lock", folder / ".working.json"
        # Not a lock of this thread alone: the others of this process work with it too.
        self._lock = FileLock(self.path, thread_local=False)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
        except Timeout:
            raise SferdError(
                f"{_name_of(owner)} is working in {folder}; allowed: one process at a time. Wait until it has ended, end it (if it is a "
                "notebook's, shut its kernel down), or take another run_folder"
            ) from None
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise SferdError(f"cannot write {self.path}: {error.strerror}{_free(self.path)}; allowed: a folder to write to") from error
            raise _no_locks(folder) from error
        if isinstance(self._lock, SoftFileLock):  # filelock's way out, a file that would outlive its process
            self._lock.release()
            raise _no_locks(folder)
        self._identity = self._found()
        write_json(owner, {"pid": os.getpid(), "host": platform.node()})

    @property
    def held(self) -> bool:
        """Whether this process has it: not after ``leave``, and not in a process forked from the one that made it."""
        return self._lock.is_locked

    @property
    def gone(self) -> bool:
        """Whether the folder was removed, or its lock, since this was made."""
        return self._found() != self._identity

    def check(self) -> None:
        """Raise SferdError if it is gone."""
        if self.gone:
            raise SferdError(
                f"{self.folder} was removed or replaced while process {os.getpid()} was working in it: what was there is lost, and nothing "
                "more is written. Start the run again, there or in another run_folder"
            )

    def release(self) -> None:
        """Let others work in the folder."""
        self._lock.release(force=True)

    def _found(self) -> tuple[int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino


# Those of this process, by process too: a forked one inherits the table, but not the locks.
_locks: WeakValueDictionary[tuple[int, Path], FolderLock] = WeakValueDictionary()


def work_in(folder: Path | str) -> FolderLock:
    """The lock on ``folder``, this process's own if it has one already: keep it for as long as you work there.

    Raises SferdError when another process works there, and when the file system has no locks.
    """
    key = (os.getpid(), Path(folder).resolve())
    lock = _locks.get(key)
    if lock is None or lock.gone:
        lock = _locks[key] = FolderLock(key[1])
    return lock


def leave(folder: Path | str) -> None:
    """Give up this process's lock on ``folder``, if it has one: for processes of its own that are to work there."""
    lock = _locks.pop((os.getpid(), Path(folder).resolve()), None)
    if lock is not None:
        lock.release()


def _name_of(owner: Path) -> str:
    try:
        record = read_json(owner)
        return f"process {record['pid']} on {record['host']}"
    except (SferdError, KeyError, TypeError):  # it has only just begun
        return "another process"


def _no_locks(folder: Path) -> SferdError:
    return SferdError(
        f"the file system of {folder} has no locks, so two processes could spoil each other's work there; allowed: a run_folder on a local "
        "disk, or on a network's with its lock service"
    )


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as JSON with sorted keys, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def is_file(path: Path | str) -> bool:
    """Whether that file is there; a name that no file can have, too long or with a zero byte, is of none."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def read_json(path: Path | str) -> Any:
    """The value in a JSON file. Raises SferdError when it is missing or not JSON, as ``parse_json`` reads it."""
    if not is_file(path):
        raise SferdError(f"{path} is missing")
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SferdError(f"{path} is not JSON: {error}") from None


def read_record(path: Path | str, *keys: str) -> dict[str, Any]:
    """The object in a JSON file. Raises SferdError also for another value, and when it lacks one of ``keys``."""
    record = read_json(path)
    if not isinstance(record, dict):
        raise SferdError(f"{path} holds a {type(record).__name__}; expected an object")
    if missing := [key for key in keys if key not in record]:
        raise SferdError(f"{path} has no '{missing[0]}'; expected an object with {', '.join(keys)}")
    return record


def parse_json(text: str) -> Any:
    """The value that ``text`` spells in JSON. Raises SferdError for anything else.

    As the standard has it and Python's own reader does not: no NaN or infinity, no number beyond a float's range, no name twice in an
    object. An array within an array about a thousand times over is refused too.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the name '{next(name for name in found if names.count(name) > 1)}' is twice in one object")
        return found

    def constant(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON's")

    def finite(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            raise ValueError(f"the number {digits} is beyond a float's range")
        return value

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=constant, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise SferdError(str(error)) from None


class _PlainLoader(yaml.SafeLoader):
    """Values alone: no Python objects, no names twice in a mapping, and no aliases, a few lines of which can stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "an alias, which is not read", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a name is twice in one mapping", node.start_mark)
        return mapping


def read_yaml(path: Path | str) -> Any:
    """The value in a YAML file. Raises SferdError when it is missing or not plain YAML: tags of Python's and aliases are not read."""
    if not is_file(path):
        raise SferdError(f"{path} is missing")
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), _PlainLoader)
    # What PyYAML raises for a tag on a value that it does not fit (!!bool x, !!int "", !!timestamp x) is whatever its conversion met.
    except (OSError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, yaml.YAMLError) as error:
        raise SferdError(f"{path} cannot be read as YAML: {error}") from None


def content_sha256(tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> str:
    """The SHA-256, in hexadecimal, of what a file of ``save_tensors`` holds: each tensor's name, dtype, shape and bytes, and ``info``."""
    digest = hashlib.sha256(json.dumps(info, sort_keys=True, allow_nan=False).encode())
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write ``tensors`` and the JSON-able ``info`` to one safetensors file with their ``content_sha256``, whole or not at all.

    The same input gives the same bytes.
    """
    # As it will be read: numbers that are names become text.
    info = json.loads(json.dumps(info, allow_nan=False))
    # A single metadata entry, since safetensors does not keep the order of several.
    metadata = {METADATA_KEY: json.dumps([content_sha256(tensors, info), info], sort_keys=True)}
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def load_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The (tensors, info) of a file made by ``save_tensors``. Raises SferdError when it is missing, altered or of another kind.

    A file whose metadata are the object alone, as this package once wrote and ships, is read as it is: that its bytes are those that were
    written is then known only where the file's own SHA-256 is (``made.json``, ``students.json``, the tables of scores).
    """
    if not is_file(path):
        raise SferdError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            if text is None:
                raise SferdError(f"{path} was not written by sferd_lab: its metadata has no '{METADATA_KEY}' entry")
            # Clones, since what safe_open gives is a view of the file: changing the file would change it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise SferdError(f"{path} is not a readable safetensors file: {error}") from None
    try:
        info = parse_json(text)
    except SferdError as error:
        raise SferdError(f"{path} is not a readable safetensors file: its '{METADATA_KEY}' metadata is not JSON: {error}") from None
    if isinstance(info, dict):
        return tensors, info
    if not isinstance(info, list) or [type(part) for part in info] != [str, dict]:
        raise SferdError(f"{path}: the '{METADATA_KEY}' metadata is {type(info).__name__}; expected a SHA-256 and an object")
    expected, info = info
    if (found := content_sha256(tensors, info)) != expected:
        raise SferdError(f"{path} was altered: its content has SHA-256 {found}; expected {expected}. Make the file again, or take a copy")
    return tensors, info


def project_folder() -> Path:
    """The clone that this package is used from (it holds a pyproject.toml), else the current folder."""
    clone = Path(__file__).resolve().parent.parent
    return clone if (clone / "pyproject.toml").is_file() else Path.cwd()


def sha256(path: Path | str) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
