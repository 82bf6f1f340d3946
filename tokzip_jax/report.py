"""What a run shows: the table of its rows and the two figures."""

import functools

import jax
import numpy as np
from jax.sharding import Mesh

from tokzip_jax import plots, vlm
from tokzip_jax.config import MethodConfig, ModelConfig, RunConfig
from tokzip_jax.evals import table
from tokzip_jax.evals.runner import Runner, load_stage
from tokzip_jax.types import Array, Params, VisualTokens
from tokzip_jax.workdir import Workdir

SELECTING = ("visionzip", "random", "uniform")  # encoder sites whose choice of patches can be drawn
CAPTION = (
    "accuracy: exact match, per cent; % of full = x / {upper}; retention = (x - {lower}) / ({upper} - {lower}), a dash "
    "where the span is under 5 points.\n"
    "KV cache: what one picture keeps while it is asked about; prefill: FLOPs of the language model for a question of "
    "{tokens} tokens (VoCo: from its cache)."
)


def make(cfg: RunConfig, workdir: Workdir, mesh: Mesh) -> str:
    """Measure the rows that are not measured yet, write `eval/` and `figures/`, and return the table as text."""
    runner = Runner.create(cfg, workdir, mesh)
    rows = runner.run()
    if jax.process_count() == 1:
        draw(cfg, workdir, mesh, runner, rows)
    caption = CAPTION.format(upper=cfg.eval.upper, lower=cfg.eval.lower, tokens=runner.question_tokens)
    return f"{table.text_table(rows)}\n\n{caption}\nwritten to {workdir.eval} and {workdir.figures}"


def draw(cfg: RunConfig, workdir: Workdir, mesh: Mesh, runner: Runner, rows: list[table.RowResult]) -> None:
    """`figures/retention.png` and `figures/kept_tokens.png`."""
    bounds = [name for name, row in cfg.rows.items() if name in (cfg.eval.lower, cfg.eval.upper) or not row.stage]
    plots.retention_figure(rows, workdir.figures / "retention.png", lines=bounds)
    if not cfg.eval.pictures:
        return
    batch = _first_pictures(runner, cfg.eval.pictures)
    columns = _columns(cfg, workdir, mesh, batch)
    if columns:
        panels = [[column(row) for column in columns] for row in range(len(batch["images"]))]
        plots.kept_tokens_figure(np.asarray(batch["images"][:, 0]), panels, workdir.figures / "kept_tokens.png")


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


@functools.partial(jax.jit, static_argnums=(0, 3))
def _encode(cfg: ModelConfig, params: Params, images: Array, method: MethodConfig) -> VisualTokens:
    return vlm.encode(cfg, params, images, method, jax.random.key(method.seed))[0]


def _columns(cfg: RunConfig, workdir: Workdir, mesh: Mesh, batch: dict[str, np.ndarray]) -> list:
    """Functions row -> panel: a column for every selecting row, and one for the row with the most VoCo tokens."""
    names = [*cfg.eval.order, *(name for name in cfg.rows if name not in cfg.eval.order)]
    columns = []
    for name in names:
        row = cfg.rows[name]
        if row.method.encoder in SELECTING:
            params = load_stage(cfg, workdir, mesh, row.stage)
            tokens = jax.device_get(_encode(cfg.model, params, batch["images"], row.method))
            columns.append(functools.partial(plots.kept_panel, name, tokens))
    looking = [n for n in names if cfg.rows[n].method.voco and cfg.rows[n].method.voco_mask != "visible"]
    looking = [n for n in looking if n != cfg.eval.lower and cfg.rows[n].method.encoder == "none"]
    if looking:
        name = max(looking, key=lambda n: cfg.rows[n].method.voco)
        row = cfg.rows[name]
        params = load_stage(cfg, workdir, mesh, row.stage)
        inputs = {n: batch[n] for n in ("images", "ids", "thread", "sample", "supervised")}
        looks = jax.jit(functools.partial(vlm.voco_attention, cfg.model, method=row.method))(params, inputs)
        looks_LBkP = np.asarray(looks)
        columns.append(lambda row: plots.LooksPanel(f"{name}: where each token looks", looks_LBkP[:, row]))
    return columns
