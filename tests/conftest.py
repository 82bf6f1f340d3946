"""Settings of the whole suite: eight CPU devices, guards on, compiled programs kept between runs."""

import collections
import functools
import gc
import os
import shutil
import tempfile

# Tests speak of CPU devices and CPU numerics; set JAX_PLATFORMS to try them elsewhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# With a limit, however large, JAX locks its cache of programs: workers, and processes that tests start, share one.
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**33))

import hypothesis
import jax
import pytest

from tokzip_jax import sharding

# Whole runs. They begin first, so that no worker is left with one of them at the end.
LONGEST = ("sharded_training", "study", "sweep", "cli", "resume", "bench", "lora_training", "publish")
CACHE = "TOKZIP_JAX_TEST_CACHE"  # where programs are, for workers of a run that keeps none for later ones

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("suite")


def pytest_configure(config):
    # Eight devices cost single-device tests nothing: what is not told otherwise runs on the first one, with all cores.
    jax.config.update("jax_num_cpu_devices", 8)
    # Programs run for a moment here and compile for minutes: compile them carelessly.
    jax.config.update("jax_disable_most_optimizations", True)
    cache = getattr(config, "cache", None)
    if cache is not None:
        directory = str(cache.mkdir("jax"))
    elif CACHE in os.environ:
        directory = os.environ[CACHE]
    else:  # -p no:cacheprovider: gone with this run
        directory = os.environ[CACHE] = tempfile.mkdtemp()
        config.add_cleanup(functools.partial(shutil.rmtree, directory))
        config.add_cleanup(functools.partial(os.environ.pop, CACHE))
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    # Below pytest a traced operation stands under a hundred frames, and each of them would be written into its program.
    jax.config.update("jax_traceback_in_locations_limit", 1)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """The longest files first (with --no-loadscope-reorder they are handed out in this order), then those of most
    tests."""
    tests = collections.Counter(item.path for item in items)
    rank = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (rank.get(item.path.name, len(LONGEST)), -tests[item.path]))


def pytest_collection_finish():
    """What was imported stays: the garbage collector need not look through it while JAX traces."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="module")
def one_device():
    """A mesh of one device, for whole runs that are not about meshes: eight take half as long again to compile."""
    make = sharding.make_mesh
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(sharding, "make_mesh", lambda cfg, devices=None: make(cfg, devices or jax.devices()[:1]))
        yield


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Let go of a module's compiled programs: the whole suite's need more memory maps than a process may have."""
    yield
    jax.clear_caches()
    gc.collect()  # programs that stand in cycles, too
