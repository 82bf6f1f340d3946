"""The best recipe for VoCo tokens that was found on drawn scenes, change by change, beside pooling of as many steps.

    python train.py --config=configs/scenes_best.py --workdir=runs/scenes_best

It starts from the uncompressed model of a run of `configs/scenes.py` in `runs/scenes`
(`--config=configs/scenes_best.py:DIR` names another one), where one and four VoCo tokens, and average pooling to as
many, are trained for `scenes.STEPS` steps. Here the steps become twice as many; then VoCo tokens start from the cells
of a grid over the picture, each through a matrix of its own, as well as from their embeddings (see
`tokzip_jax.voco_start`). Pooling has as many steps too. All by the rules of that study: three learning rates, of which
the validation split chooses one, three seeds, and a column at the training time of one token from cells.
How far one token comes with more steps is the question of `configs/scenes_limit.py`. Give the command twice to use two
CPU cores.
"""

import dataclasses

from configs import scenes
from tokzip_jax import config as c
from tokzip_jax.config_io import to_config_dict

LONGER = 2  # times the study's steps
CELLS = 4  # along a side of 8 patches
GRIDS = {1: 1, 4: 2}  # tokens -> side of the grid that pooling makes as many with
NAMES = {"voco": "VoCo {}", "cells": "VoCo {} + cells", "pooled": "average pooling {}"}


def get_config(pictures="runs/scenes"):
    """The config as an editable ConfigDict; `pictures` is the workdir of the study."""
    return to_config_dict(run_config(pictures))


def run_config(pictures: str = "runs/scenes") -> c.RunConfig:
    """The config as dataclasses."""
    given, compared = scenes.run_config(), stages()
    # The study's model, taken over by a step at learning rate 0.
    still = dataclasses.replace(scenes.OPTIM, learning_rate=0.0, warmup_steps=0, weight_decay=0.0)
    origin = f"{pictures}/checkpoints/base"
    base = dataclasses.replace(scenes.towers()["base"], init_from=origin, steps=1, optim=still)
    table = rows(compared)
    return dataclasses.replace(
        given,
        model=dataclasses.replace(given.model, voco_cells=CELLS),
        data=dataclasses.replace(given.data, tokenizer=f"{pictures}/tokenizer.json"),
        stages={"base": base, **compared},
        rows=table,
        eval=dataclasses.replace(given.eval, order=tuple(table)),
        study=dataclasses.replace(given.study, stages=tuple(compared), equal_time="cells1"),
    )


def stages() -> dict[str, c.StageConfig]:
    """What is compared."""
    table = {}
    for count, grid in GRIDS.items():
        plain, pool = scenes.voco(count, steps=LONGER * scenes.STEPS), scenes.pooled(grid)
        table[f"voco{count}"] = plain
        table[f"cells{count}"] = dataclasses.replace(
            plain, method=dataclasses.replace(plain.method, voco_start="cells")
        )
        table[f"pooled{count}"] = dataclasses.replace(pool, steps=plain.steps)
    return table


def rows(trained: dict[str, c.StageConfig]) -> dict[str, c.RowConfig]:
    """The table, top to bottom."""
    named = {name.format(count): f"{stage}{count}" for count in GRIDS for stage, name in NAMES.items()}
    read = {name: c.RowConfig(stage=stage, method=trained[stage].method) for name, stage in named.items()}
    lower = c.RowConfig(method=c.MethodConfig(voco=1, voco_mask="voco"))
    return {"question-only prior": c.RowConfig(stage=""), "lower": lower, **read, "upper": c.RowConfig()}
