"""Reading safetensors files without reading their tensors."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

INDEX = ".safetensors.index.json"


class LazyTensor:
    """A tensor of a file: its shape is known, `np.asarray` reads it (bfloat16 stays bfloat16).

    Attributes:
        shape: of the stored tensor.
    """

    def __init__(self, file: Any, key: str) -> None:
        """Args: an open safetensors file, and the tensor's name in it."""
        self._file, self._key = file, key
        self.shape = tuple(file.get_slice(key).get_shape())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read it; nothing is kept, so that a converter holds one tensor at a time. NumPy itself casts to `dtype`."""
        return self._file.get_tensor(self._key)


def read_safetensors(paths: str | pathlib.Path | Sequence[str | pathlib.Path]) -> dict[str, LazyTensor]:
    """The tensors of one or more safetensors files, by name; only headers are read.

    Args:
        paths: files, `*.safetensors.index.json` files of sharded checkpoints, or directories (what the index in it
            names, else every `*.safetensors` in it).

    Raises:
        FileNotFoundError: a path, or a file that an index names, is not there.
        ValueError: not a safetensors file, a directory without any, or a name that two files hold.
    """
    paths = [paths] if isinstance(paths, str | pathlib.Path) else paths
    tensors, origin = {}, {}
    for path in dict.fromkeys(file for given in paths for file in _files(pathlib.Path(given).expanduser())):
        try:
            file = safe_open(str(path), framework="np")
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
        for key in list(file.keys()):
            if key in tensors:
                raise ValueError(f"{key} is both in {origin[key]} and in {path}; give only one of them")
            tensors[key], origin[key] = LazyTensor(file, key), path
    return tensors


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files that a path stands for."""
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}")
    if path.is_dir():
        found = sorted(path.glob(f"*{INDEX}")) or sorted(path.glob("*.safetensors"))
        if not found:
            raise ValueError(f"{path} holds no .safetensors file; other formats (.bin, .pt) must be converted first")
        return [file for part in found for file in _files(part)]
    if not path.name.endswith(INDEX):
        return [path]
    names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    absent = [name for name in names if not (path.parent / name).exists()]
    if absent:
        raise FileNotFoundError(f"{path} names files that are not there: {', '.join(absent)}")
    return [path.parent / name for name in names]
