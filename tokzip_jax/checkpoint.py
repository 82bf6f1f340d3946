"""Checkpoints: everything that touches Orbax.

A training saves its state and the position of its data iterator together, under one step, in a directory that is
renamed into place when it is complete: a process killed at any moment leaves the checkpoints before it usable. Values
are restored into an abstract tree (`ShapeDtypeStruct`s with shardings), so onto any mesh.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from tokzip_jax import sharding
from tokzip_jax.paths import flatten, nest

FINAL = "FINAL.json"  # written when a training has done its last step


class Checkpointer:
    """The checkpoints of one training.

    Attributes:
        directory: where they are, one subdirectory a step.
    """

    def __init__(self, directory: str, *, keep: int = 2, info: Mapping[str, Any] | None = None) -> None:
        """Open (or create) a directory of checkpoints; use as a context manager, which waits for running saves.

        Args:
            directory: where they go.
            keep: how many of the latest ones stay.
            info: JSON kept with every checkpoint: model config, version of the code.
        """
        self.directory = _path(directory)
        self._info = json.loads(json.dumps(info or {}))
        self._manager = ocp.training.Checkpointer(
            self.directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def latest(self) -> int | None:
        """The last step that was saved completely, or None."""
        return None if self._manager.latest is None else self._manager.latest.step

    def save(self, step: int, state: Any, data: Any = None) -> None:
        """Save in the background.

        Arrays and the iterator's position are copied before this returns, so training may go on at once.

        Args:
            step: steps done.
            state: pytree of arrays.
            data: a Grain iterator, whose position is saved with the state.
        """
        parts = {"state": state} | ({} if data is None else {"data": data})
        self._manager.save_checkpointables_async(step, parts, force=True, custom_metadata=self._info)

    def restore(self, abstract: Any, data: Any = None) -> tuple[int, Any]:
        """The latest checkpoint.

        Args:
            abstract: the state as arrays or `ShapeDtypeStruct`s, with the shardings that it shall have.
            data: a Grain iterator made like the saved one; it is moved to the saved position.

        Returns:
            The step and the state.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: the checkpoint is of another model or optimiser.
        """
        if self.latest is None:
            raise FileNotFoundError(f"no checkpoint in {self.directory}; train first, or start without resuming")
        place = self.directory / str(self.latest)
        _check(place, _stored(place), flatten(abstract), exact=True)
        parts = {"state": _placed(abstract)} | ({} if data is None else {"data": data})
        return self.latest, self._manager.load_checkpointables(self.latest, parts)["state"]

    def finish(self, step: int) -> None:
        """Wait for running saves, then mark the training as complete."""
        self._manager.wait()
        if jax.process_index() == 0:
            _write_json(self.directory / FINAL, {"step": step, **self._info})
        sharding.wait_for_all("the training is marked as complete")

    def close(self) -> None:
        """Wait for running saves; an error in one of them is raised here."""
        self._manager.close()


def finished(directory: str) -> int | None:
    """The step at which `Checkpointer.finish` marked a training as complete, or None."""
    marker = _path(directory) / FINAL
    return json.loads(marker.read_text())["step"] if marker.exists() else None


def read_info(path: str) -> dict[str, Any]:
    """The JSON kept with a checkpoint: a directory of steps (its latest), one step, or saved parameters."""
    return dict(ocp.metadata(_resolve(path), checkpointable_name="state").custom_metadata or {})


def save_params(path: str, params: Any, *, info: Mapping[str, Any] | None = None) -> None:
    """Write parameters alone, e.g. converted ones; what stood at `path` is replaced."""
    ocp.save(_path(path), params, overwrite=True, custom_metadata=json.loads(json.dumps(info or {})))


def absent(path: str, params: Any, fresh: Sequence[str] = ()) -> list[str]:
    """Paths of the parameters that a checkpoint lacks, looked up without reading values.

    Args:
        path: as in `load_params`.
        params: tree of arrays or `ShapeDtypeStruct`s.
        fresh: path patterns of parameters that may be absent.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: parameters without such a pattern are missing, or any have other shapes.
    """
    place = _resolve(path)
    stored, _ = _stored_params(place)
    wanted = flatten(params)
    missing = [
        name for name in wanted if name not in stored and any(re.fullmatch(pattern, name) for pattern in fresh)
    ]
    _check(place, stored, {name: leaf for name, leaf in wanted.items() if name not in missing}, exact=False)
    return missing


def stored_paths(path: str) -> list[str]:
    """Paths of the parameters that a checkpoint holds; `path` as in `load_params`."""
    return list(_stored_params(_resolve(path))[0])


def read_params(path: str) -> Any:
    """All parameters that a checkpoint holds, on the first local device; `path` as in `load_params`.

    Raises:
        FileNotFoundError: nothing there.
    """
    stored, _ = _stored_params(_resolve(path))
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in stored.items()}
    return load_params(path, nest(shapes))


def load_params(path: str, params: Any) -> Any:
    """Parameters out of a training's checkpoint or out of `save_params`.

    Args:
        path: a directory of steps (the latest is read), one step, or what `save_params` wrote.
        params: tree of arrays or `ShapeDtypeStruct`s with the wanted shardings; may be a part of what is stored.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: parameters are missing or have other shapes.
    """
    place = _resolve(path)
    stored, nested = _stored_params(place)
    _check(place, stored, flatten(params), exact=False)
    wanted = _placed(params)
    with _partial():
        found = ocp.load(place, {"params": wanted} if nested else wanted, checkpointable_name="state")
    return found["params"] if nested else found


def _path(path: str) -> epath.Path:
    return epath.Path(path).expanduser().absolute()


def _resolve(path: str) -> epath.Path:
    """The directory of one checkpoint: `path` itself, or its subdirectory with the highest step."""
    root = _path(path)
    if not root.exists():
        raise FileNotFoundError(f"no checkpoint at {root}: there is no such directory")
    steps = [child for child in root.iterdir() if child.name.isdigit() and _complete(child)]
    if not steps and _complete(root):
        return root
    if not steps and (root / FINAL).exists():
        raise FileNotFoundError(
            f"no checkpoint at {root}: it was trained to its end, but its parameters are not there (of a published run "
            "only those of chosen stages go along); remove the directory to have it trained again"
        )
    if not steps:
        raise FileNotFoundError(f"no checkpoint at {root}: it is neither one itself nor holds a complete step")
    return max(steps, key=lambda child: int(child.name))


def _complete(place: epath.Path) -> bool:
    return (place / "state").exists() and ocp.is_orbax_checkpoint(place)


def _stored(place: epath.Path) -> dict[str, Any]:
    return flatten(ocp.metadata(place, checkpointable_name="state").metadata)


def _stored_params(place: epath.Path) -> tuple[dict[str, Any], bool]:
    """What parameters a checkpoint holds, and whether they lie in a training's state."""
    stored = _stored(place)
    if "opt_state" not in {name.split("/")[0] for name in stored} and "params/llm/embed/table" not in stored:
        return stored, False
    return {name.removeprefix("params/"): leaf for name, leaf in stored.items() if name.startswith("params/")}, True


def _check(place: epath.Path, stored: Mapping[str, Any], wanted: Mapping[str, Any], *, exact: bool) -> None:
    """Compare paths and shapes, so that a foreign checkpoint is one sentence and not a page of Orbax."""
    wrong = []
    for name, leaf in wanted.items():
        if name not in stored:
            wrong.append(f"{name} is missing there, {tuple(leaf.shape)} here")
        elif tuple(stored[name].shape) != tuple(leaf.shape):
            wrong.append(f"{name} is {tuple(stored[name].shape)} there, {tuple(leaf.shape)} here")
    if exact:
        wrong += [f"{name} is {tuple(stored[name].shape)} there, missing here" for name in stored if name not in wanted]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"checkpoint {place} is of another model: {'; '.join(wrong[:3])}{more}")


def _placed(tree: Any) -> Any:
    """`ShapeDtypeStruct`s that all say where they go; otherwise Orbax wants the devices of the process that saved."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here)

    return jax.tree.map(place, tree)


@contextlib.contextmanager
def _partial() -> Iterator[None]:
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        yield


def _write_json(path: epath.Path, value: Mapping[str, Any]) -> None:
    # Written beside and renamed, so that a killed process leaves the whole file or none.
    beside = path.parent / f"{path.name}.new"
    beside.write_text(json.dumps(value, indent=2) + "\n")
    beside.replace(path)
