"""What a run ran on: versions, devices, flags and commit; platform check and compilation cache."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

PACKAGES = (
    "tokzip_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "numpy",
)
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS")


def versions() -> dict[str, str]:
    """{package: version} of what computes; "source" for a checkout that was never installed, "absent" otherwise."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "source" if name == "tokzip_jax" else "absent"
    return found


def commit() -> dict[str, Any]:
    """{"commit", "dirty"} of the checkout that this file runs from; both None outside of one.

    Dirty means that a tracked file differs from the commit.
    """
    here = pathlib.Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside somebody else's checkout (a virtual environment), whose commit says nothing.
    if git("ls-files", "--error-unmatch", here.name) is None:
        return {"commit": None, "dirty": None}
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}


def describe(seed: int) -> dict[str, Any]:
    """One entry of a workdir's `environment.json`, all of it JSON."""
    devices = jax.devices()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "versions": versions(),
        "platform": jax.default_backend(),
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
        "flags": {name: os.environ.get(name, "") for name in FLAGS},
        **commit(),
        "seed": seed,
    }


def require_platform(wanted: str) -> None:
    """Refuse to run on another kind of device than the config was made for.

    Args:
        wanted: "cpu", "gpu" or "tpu"; "accelerator" = anything but a CPU; "" = anything.

    Raises:
        ValueError: JAX found something else, e.g. fell back to the CPU.
    """
    found = jax.default_backend()
    if wanted in ("", found) or (wanted == "accelerator" and found != "cpu"):
        return
    name = "a TPU or GPU" if wanted == "accelerator" else wanted.upper()
    raise ValueError(
        f"platform = {wanted!r}, but JAX found {jax.device_count()} x {jax.devices()[0].device_kind} ({found!r}); "
        f"install JAX for {name} (requirements-*.txt), or give --config.platform= to run on {found} all the same"
    )


def setup_compile_cache(path: str) -> None:
    """Keep compiled programs in a directory, so that the next start does not compile them again; "" = do not."""
    where = str(pathlib.Path(path).expanduser().absolute()) if path else None
    jax.config.update("jax_compilation_cache_dir", where)
    # JAX decides once a process whether there is a cache; forget what it decided before.
    compilation_cache.reset_cache()
