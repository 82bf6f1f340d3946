"""Measure a run's table, or the table of converted parameters.

    python eval.py --workdir=DIR [--rows="VoCo 1,upper"] [--remeasure]
    python eval.py --workdir=DIR --config=configs/X.py --checkpoint=PATH
    python eval.py --workdir=DIR --methods=all|free|NAME,NAME [--budgets=1,4,9,16] [--held_out=200]
                   [--steps=300] [--second_turn] [--bf16]
    python eval.py --workdir=DIR --learned="VoCo 1,VoCo 8" [--learned_pictures=2000]

The first form reads the config of a run and prints the table that train.py printed; what the workdir holds already is
not measured again unless `--remeasure` is given. The second one measures every row with the parameters at PATH in the
place of its stage's; DIR need not exist, and what is in it stays: these results go to folders of their own,
`eval/checkpoints/NAME` and `figures/checkpoints/NAME`. `--config` may be given in the first form too, e.g. to run where
the config's platform is not (`--config.platform=`) or on another mesh.

The third form measures other methods than those of the config's rows, each at every budget: "free" needs no training,
"all" trains the projectors as the run trains its own compressors and goes on where it was killed; `--held_out` leaves
so many training pictures out of these trainings, to choose learning rates on them, `--steps` makes all of them so
long. See `sweep`.

The fourth form says what the VoCo tokens of rows learned: where they look, layer by layer, and which facts of a scene a
linear read-out finds in their cache, as JSON and a figure. It needs pictures whose facts are known. See `learned_run`.
"""

import zlib

import jax
from absl import flags
from ml_collections import config_flags

from tokzip_jax import entry, learned_run, report, sweep, sweep_run
from tokzip_jax.config import RunConfig
from tokzip_jax.config_io import from_config_dict
from tokzip_jax.evals.runner import Runner
from tokzip_jax.metrics import say
from tokzip_jax.workdir import FREE, Workdir

WITH_METHODS = {  # what an option of sweeps is about
    "second_turn": "whose second turn is measured",
    "bf16": "whose choices are compared",
    "held_out": "whose trainings leave pictures out",
    "steps": "whose trainings are that long",
}


def run(
    workdir: Workdir,
    cfg: RunConfig | None = None,
    *,
    checkpoint: str = "",
    rows: tuple[str, ...] = (),
    again: bool = False,
    methods: tuple[str, ...] = (),
    budgets: tuple[int, ...] = sweep.BUDGETS,
    held_out: int = 0,
    steps: int = 0,
    second_turn: bool = False,
    bf16: bool = False,
    learned: tuple[str, ...] = (),
    pictures: int = learned_run.PICTURES,
) -> str:
    """The table as text.

    Args:
        workdir: of a run, or where the results of a checkpoint go.
        cfg: its config; None = the one that the workdir holds.
        checkpoint: parameters to measure in the place of the stages' own.
        rows: which rows; () = all, which also writes table and figures.
        again: also measure the rows whose result the workdir holds.
        methods, budgets, held_out, steps: a sweep instead of the config's rows, see `sweep.plan`; () = none.
        second_turn: with methods, also answers with tokens chosen for another question.
        learned: rows whose VoCo tokens are looked at, see `learned_run`; () = none.
        pictures: with learned, how many of the eval split.

    Raises:
        ValueError: methods or learned with what they do not go with, a checkpoint without a config, a config without
            rows, or what `entry.start`, `sweep.plan`, `learned_run.check` and the rows raise.
        FileNotFoundError: no run, or no checkpoint.
    """
    given = {"second_turn": second_turn, "bf16": bf16, "held_out": held_out, "steps": steps}
    if not methods and (alone := next((name for name, value in given.items() if value), "")):
        raise ValueError(f"--{alone} needs --methods, {WITH_METHODS[alone]}")
    if methods and (checkpoint or rows):
        raise ValueError(
            "--methods measures a run's own checkpoints at every budget: give neither --checkpoint nor --rows"
        )
    if learned and (checkpoint or rows or methods):
        raise ValueError("--learned reads a run's own checkpoints: give neither --checkpoint, --rows nor --methods")
    if checkpoint and cfg is None:
        raise ValueError("--checkpoint needs --config, the model and the rows to measure it with")
    if cfg is None:
        cfg = workdir.read_config()
    mesh = entry.start(cfg)
    if not cfg.rows:
        raise ValueError("the config has no rows to measure: add some to its rows")
    if methods:
        # What cannot be is said before anything is opened.
        sweep.plan(cfg, methods, budgets, held_out=held_out, steps=steps)
    if learned:
        learned_run.check(cfg, learned, pictures)
    if checkpoint or workdir.config.exists():
        workdir.open(cfg, free=(*FREE, "mesh.data", "mesh.model"))
    else:
        workdir.read_config()  # says that there is no run
    with jax.set_mesh(mesh):
        if methods:
            asked = {"held_out": held_out, "steps": steps, "again": again, "second": second_turn, "bf16": bf16}
            return sweep_run.make(cfg, workdir, mesh, methods, budgets, **asked)
        if learned:
            return learned_run.make(cfg, workdir, mesh, learned, pictures)
        if checkpoint:
            # The run's own table, if there is one, stays what it was.
            name = f"{checkpoint.rstrip('/').rpartition('/')[2]}-{zlib.crc32(checkpoint.encode()):08x}"
            workdir = Workdir(workdir.root, f"checkpoints/{name}")
        return report.make(Runner.create(cfg, workdir, mesh, checkpoint), rows, again=again)


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file(
        "config", None, "A file of configs/.", lock_config=False, accept_new_attributes=True
    )
    WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a run, or where the results of a checkpoint go.")
    CHECKPOINT = flags.DEFINE_string("checkpoint", "", "Measure these parameters in the place of the stages' own.")
    ROWS = flags.DEFINE_list("rows", [], "Rows to measure and print; the table in the workdir stays as it is.")
    REMEASURE = flags.DEFINE_bool("remeasure", False, "Measure also what the workdir holds already.")
    METHODS = flags.DEFINE_list("methods", [], "Methods to measure instead of the rows: all, free, or names.")
    BUDGETS = flags.DEFINE_list("budgets", list(map(str, sweep.BUDGETS)), "Visual tokens of a picture, with --methods.")
    HELD_OUT = flags.DEFINE_integer(
        "held_out", 0, "With --methods: training pictures that its trainings leave out, to choose learning rates on."
    )
    STEPS = flags.DEFINE_integer("steps", 0, "With --methods: steps of its trainings; 0 = those of the run's own.")
    SECOND = flags.DEFINE_bool(
        "second_turn", False, "With --methods: tokens chosen for one question read for the next."
    )
    BF16 = flags.DEFINE_bool("bf16", False, "With --methods: which patches a model in bfloat16 keeps, too.")
    LEARNED = flags.DEFINE_list("learned", [], "Rows to look into: what their VoCo tokens look at and hold.")
    PICTURES = flags.DEFINE_integer("learned_pictures", learned_run.PICTURES, "With --learned: how many are looked at.")
    flags.mark_flag_as_required("workdir")

    def main() -> None:
        """Flags to arguments."""
        cfg = None if CONFIG.value is None else from_config_dict(CONFIG.value)
        try:
            budgets = tuple(int(budget) for budget in BUDGETS.value)
        except ValueError:
            raise ValueError(f"--budgets={','.join(BUDGETS.value)} must be whole numbers with commas between") from None
        text = run(
            Workdir(WORKDIR.value),
            cfg,
            checkpoint=CHECKPOINT.value,
            rows=tuple(ROWS.value),
            again=REMEASURE.value,
            methods=tuple(METHODS.value),
            budgets=budgets,
            held_out=HELD_OUT.value,
            steps=STEPS.value,
            second_turn=SECOND.value,
            bf16=BF16.value,
            learned=tuple(LEARNED.value),
            pictures=PICTURES.value,
        )
        say(text)

    entry.main(main)
