"""Several processes in one workdir: what one of them holds, the others leave alone or wait for."""

import contextlib
import pathlib
import time
import urllib.parse
from collections.abc import Iterable, Iterator

import filelock
import jax

POLL = 2.0  # seconds between two looks at what other processes have finished


@contextlib.contextmanager
def hold(root: pathlib.Path, name: str, *, wait: bool = True) -> Iterator[bool]:
    """Hold a name against the other processes of this machine; one that is killed lets go.

    The hosts of one job do all things together, so with several of them nothing is locked.

    Args:
        root: the workdir.
        name: what is held; not one that is held already.
        wait: until it is free; else False is yielded where another process holds it.

    Yields:
        Whether it is held now.
    """
    if jax.process_count() > 1:
        yield True
        return
    path = root / "locks" / urllib.parse.quote(name, safe=" ")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(blocking=wait)
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def in_turn(root: pathlib.Path, names: Iterable[str]) -> Iterator[str]:
    """Names of pieces of work, each while it is held: what another process is at comes last, and may be done by then.

    Args:
        root: the workdir.
        names: not the same one twice.

    Yields:
        Every name once.
    """
    left = list(names)
    while left:
        for name in [*left]:
            with hold(root, name, wait=False) as mine:
                if mine:
                    left.remove(name)
                    yield name
        if left:
            time.sleep(POLL)
