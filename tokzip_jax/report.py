"""What a run shows: the table of its rows and the figures."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from tokzip_jax import plots, plots_accuracy, sharding, vlm
from tokzip_jax.config import MethodConfig, ModelConfig
from tokzip_jax.evals import table
from tokzip_jax.evals.runner import MODEL_INPUTS, Runner
from tokzip_jax.projectors import KEEPS_PLACES
from tokzip_jax.study import Study
from tokzip_jax.types import Array, Params, VisualTokens

CAPTION = (
    "accuracy: exact match, per cent; % of full = x / {upper}; retention = (x - {lower}) / ({upper} - {lower}), a dash "
    "where the span is under 5 points.\n"
    "KV cache: what one picture keeps while it is asked about; prefill: FLOPs of the language model for a question of "
    "{tokens} tokens (VoCo: from its cache)."
)


def make(runner: Runner, names: Sequence[str] = (), *, again: bool = False) -> str:
    """Measure rows and return their table as text.

    Args:
        runner: of the run; call this with its mesh set.
        names: which rows; () = all, which also writes `eval/` and `figures/`.
        again: also measure the rows whose result the workdir holds.
    """
    cfg, workdir = runner.cfg, runner.workdir
    studied = Study(cfg, workdir, runner.mesh) if cfg.study.stages and not runner.checkpoint else None
    rows = runner.run(names, again=again, row=studied.row if studied else None)
    caption = CAPTION.format(upper=cfg.eval.upper, lower=cfg.eval.lower, tokens=runner.question_tokens)
    text = f"{table.text_table(rows)}\n\n{caption}"
    if names:
        return text
    if studied:
        studied.write_record()
        runner = dataclasses.replace(runner, cfg=studied.first())
    draw(runner, rows)
    return f"{text}\nwritten to {workdir.eval} and {workdir.figures}"


def draw(runner: Runner, rows: list[table.RowResult]) -> None:
    """`figures/retention.png`, `types.png` and `kept_tokens.png`; every process takes part, process 0 writes."""
    cfg, figures = runner.cfg, runner.workdir.figures
    batch = _first_pictures(runner, cfg.eval.pictures) if cfg.eval.pictures else {}
    columns = _columns(runner, batch) if batch else []
    if jax.process_index() != 0:
        return
    bounds = [name for name, row in cfg.rows.items() if name in (cfg.eval.lower, cfg.eval.upper) or not row.stage]
    plots_accuracy.retention_figure(rows, figures / "retention.png", lines=bounds)
    if any(row.accuracy_by_type for row in rows):
        plots_accuracy.types_figure(rows, figures / "types.png", lines=bounds)
    if columns:
        panels = [[column(row) for column in columns] for row in range(len(batch["images"]))]
        plots.kept_tokens_figure(batch["images"][:, 0], panels, figures / "kept_tokens.png")


def _first_pictures(runner: Runner, count: int) -> dict[str, np.ndarray]:
    """One eval row for each of the first `count` pictures."""
    found: dict[int, dict[str, np.ndarray]] = {}
    for batch in runner.batches():
        for row, example in enumerate(batch["example"]):
            if example >= 0:
                found.setdefault(int(example), {name: values[row] for name, values in batch.items()})
        if len(found) >= count:
            break
    chosen = [found[example] for example in sorted(found)[:count]]
    return {name: np.stack([row[name] for row in chosen]) for name in chosen[0]}


# Replicated results can be read in every process.
@functools.partial(jax.jit, static_argnums=(0, 3), out_shardings=P())
def _encode(cfg: ModelConfig, params: Params, batch: dict[str, Array], method: MethodConfig) -> VisualTokens:
    # A row may hold the frames of a video; the first one is drawn.
    text = vlm.question(cfg, batch, method)
    return vlm.encode(cfg, params, batch["images"][:, :1], method, jax.random.key(method.seed), text=text)[0]


@functools.partial(jax.jit, static_argnums=(0, 3), out_shardings=P())
def _looks(cfg: ModelConfig, params: Params, batch: dict[str, Array], method: MethodConfig) -> Array:
    return vlm.voco_attention(cfg, params, batch, method)


def _columns(runner: Runner, batch: dict[str, np.ndarray]) -> list:
    """Functions row -> panel: a column for every selecting row, and one for the row with the most VoCo tokens."""
    cfg = runner.cfg
    inputs = sharding.place(runner.mesh, {name: batch[name] for name in MODEL_INPUTS if name in batch})
    names = [*cfg.eval.order, *(name for name in cfg.rows if name not in cfg.eval.order)]
    # Rows that read the frames of clips in another order have not seen the pictures that are drawn.
    names = [name for name in names if cfg.rows[name].frame_order in ("", cfg.data.scenes.frame_order)]
    columns = []
    for name in names:
        row = cfg.rows[name]
        if row.stage and row.method.encoder != "none" and row.method.projector in KEEPS_PLACES:
            tokens = jax.device_get(_encode(cfg.model, runner.load(row), inputs, row.method))
            columns.append(functools.partial(plots.kept_panel, name, tokens))
    looking = [n for n in names if cfg.rows[n].method.voco and cfg.rows[n].method.voco_mask != "visible"]
    looking = [n for n in looking if n != cfg.eval.lower and cfg.rows[n].method.encoder == "none"]
    looking = [n for n in looking if cfg.rows[n].method.packing == "tiles"]  # the panel is one picture's grid
    if looking:
        name = max(looking, key=lambda n: cfg.rows[n].method.voco)
        row = cfg.rows[name]
        looks_LBkP = np.asarray(_looks(cfg.model, runner.load(row), inputs, row.method))
        columns.append(lambda row: plots.LooksPanel(f"{name}: where each token looks", looks_LBkP[:, row]))
    return columns
