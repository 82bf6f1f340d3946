"""What the entries share: how a command line begins, and how it ends when something is wrong."""

import pathlib
import sys
import sysconfig
import traceback
from collections.abc import Callable

from absl import app, flags, logging
from jax.sharding import Mesh

from tokzip_jax import environment, sharding
from tokzip_jax.config import RunConfig
from tokzip_jax.config_check import validate
from tokzip_jax.config_io import parse_flags


class NotFinite(Exception):
    """The loss or its gradient is NaN or infinite."""


def start(cfg: RunConfig) -> Mesh:
    """Refuse what cannot work on these devices, and make the mesh.

    Raises:
        ValueError: a config that cannot work, another kind of device than it was made for, or a mesh that fits
            neither the devices nor the batches.
    """
    validate(cfg)
    environment.require_platform(cfg.platform)
    mesh = sharding.make_mesh(cfg.mesh)
    sharding.data_share(mesh)
    for name, stage in cfg.stages.items():
        sharding.check_batch(mesh, stage.batch_size, f"stages.{name}.batch_size")
        rows = stage.batch_size // stage.optim.accumulate
        sharding.check_batch(mesh, rows, f"stages.{name}.batch_size / stages.{name}.optim.accumulate")
    sharding.check_batch(mesh, cfg.eval.batch_size, "eval.batch_size")
    environment.setup_compile_cache(cfg.compile_cache)
    return mesh


def main(run: Callable[[], None]) -> None:
    """Parse the flags and run; what the user can mend ends in one sentence and exit code 1, without a traceback.

    An error that some other package raised, through our code, is ours to mend and keeps its traceback. `--verbosity=1`
    shows it in every case.
    """

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments: {argv[1:]}")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax tells a dozen lines a checkpoint
        sharding.initialize_distributed()
        try:
            run()
        except (ValueError, OSError, ModuleNotFoundError, NotFinite) as error:
            if not _said_by_us(error):
                traceback.print_exc()
            logging.debug("traceback", exc_info=True)
            sys.exit(f"error: {error}")

    app.run(guarded, flags_parser=parse_flags)


def _said_by_us(error: BaseException) -> bool:
    """Whether an error was raised by this package, an entry or a config, and not inside another package."""
    raised = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    if raised.is_relative_to(pathlib.Path(__file__).parent):
        return True
    others = (sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
    return not any(raised.is_relative_to(place) for place in others)
