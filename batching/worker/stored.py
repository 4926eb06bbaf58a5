"""The tensors in a folder's safetensors files: where each is, its format and its shape."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import NamedTuple

import msgspec

SIZES = {"F32": 4, "BF16": 2, "F16": 2}  # bytes of a number, in the formats that are no codes
_LENGTH = 8  # bytes that hold the header's length


class Stored(NamedTuple):
    """A tensor: from byte `offset` of the file `path` on."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class _Entry(msgspec.Struct):
    dtype: str = ""  # as safetensors names it
    shape: tuple[int, ...] = ()
    data_offsets: tuple[int, int] = (0, 0)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of the folder's file or files, by name. Raises OSError or `ValueError`.

    `ValueError` also where a tensor's numbers are codes.
    """
    single = folder / "model.safetensors"
    if single.exists():
        return _header(single)
    index = folder / "model.safetensors.index.json"
    files = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    headers = {file: _header(folder / file) for file in sorted(set(files.values()))}
    for name, file in files.items():
        if name not in headers[file]:
            raise ValueError(f"{file} lacks {name}")
    return {name: headers[file][name] for name, file in files.items()}


def _header(path: Path) -> dict[str, Stored]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = _LENGTH + int.from_bytes(file.read(_LENGTH), "little")
        if not _LENGTH < start <= size:
            raise ValueError(f"{path.name} is not in safetensors' format")
        header = file.read(start - _LENGTH)
    entries = msgspec.json.decode(header, type=dict[str, _Entry])
    entries.pop("__metadata__", None)
    found = {}
    for name, entry in entries.items():
        if entry.dtype not in SIZES:
            raise ValueError(f"{name} is stored as {entry.dtype}")
        begin, end = entry.data_offsets
        if not 0 <= begin <= end <= size - start:
            raise ValueError(f"{path.name} ends before {name}")
        if end - begin != prod(entry.shape) * SIZES[entry.dtype]:
            raise ValueError(f"{name} has an unexpected size")
        found[name] = Stored(path, start + begin, entry.dtype, entry.shape)
    return found
