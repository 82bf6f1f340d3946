"""The best recipe for VoCo tokens that was found on drawn scenes, change by change, beside pooling of as many steps.

    python train.py --config=configs/scenes_best.py --workdir=runs/scenes_best

It starts from the uncompressed model of a run of `configs/scenes.py` in `runs/scenes`
(`--config=configs/scenes_best.py:DIR` names another one), where one and four VoCo tokens, and average pooling to as
many, are trained for `scenes.STEPS` steps. Here the steps become twice as many; then VoCo tokens start from the mean
of their part of the picture and the cells of a grid over it, each through a matrix of its own, as well as from their
embeddings (see `tokzip_jax.voco_start`). Pooling has as many steps too. All by the rules of that study: three learning
rates, of which the validation split chooses one, three seeds, and a column at the training time of one token from
cells.

How far one token comes is asked once, with one seed and at one learning rate: ten times the steps of the study, for
VoCo from cells and for pooling. Give the command twice to use two CPU cores.

Two x86-64 CPU cores: its 38 trainings make 105 minutes of one core (2026-11-30). Expect, with four tokens, 98 % from
cells, 94 with average pooling and 92 from embeddings alone; with one 85, 81 and 84; after ten times the study's steps
93 from cells and 84 with pooling.
"""

import dataclasses

from configs import scenes
from tokzip_jax import config as c
from tokzip_jax.config_io import to_config_dict

LONGER, LONGEST = 2, 10  # times the study's steps: what is compared, and one token at its limit
CELLS = 4  # along a side of 8 patches
GRIDS = {1: 1, 4: 2}  # tokens -> side of the grid that pooling makes as many with
NAMES = {"voco": "VoCo {}", "cells": "VoCo {} + cells", "pooled": "average pooling {}"}
FAR = {"cellsfar": "cells", "pooledfar": "pooled"}  # longest trainings of one token, and of which kind


def get_config(pictures="runs/scenes"):
    """The config as an editable ConfigDict; `pictures` is the workdir of the study."""
    return to_config_dict(run_config(pictures))


def run_config(pictures: str = "runs/scenes") -> c.RunConfig:
    """The config as dataclasses."""
    given, compared = scenes.run_config(), stages()
    far = {name: dataclasses.replace(compared[f"{of}1"], steps=LONGEST * scenes.STEPS) for name, of in FAR.items()}
    # The study's model, taken over by a step at learning rate 0.
    still = dataclasses.replace(scenes.OPTIM, learning_rate=0.0, warmup_steps=0, weight_decay=0.0)
    origin = f"{pictures}/checkpoints/base"
    base = dataclasses.replace(scenes.towers()["base"], init_from=origin, steps=1, optim=still)
    table = rows({**compared, **far})
    return dataclasses.replace(
        given,
        model=dataclasses.replace(given.model, voco_cells=CELLS),
        data=dataclasses.replace(given.data, tokenizer=f"{pictures}/tokenizer.json"),
        stages={"base": base, **compared, **far},
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
    named |= {f"{NAMES[of].format(1)}, long": name for name, of in FAR.items()}
    read = {name: c.RowConfig(stage=stage, method=trained[stage].method) for name, stage in named.items()}
    lower = c.RowConfig(method=c.MethodConfig(voco=1, voco_mask="voco"))
    return {"question-only prior": c.RowConfig(stage=""), "lower": lower, **read, "upper": c.RowConfig()}
