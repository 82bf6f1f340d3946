"""The best recipe for VoCo tokens that was found on drawn scenes, change by change, and pooling with more steps.

    python train.py --config=configs/scenes_best.py --workdir=runs/scenes_best

It starts from the uncompressed model of a finished run of `configs/scenes.py` in `runs/scenes`
(`--config=configs/scenes_best.py:DIR` names another one), where one and four VoCo tokens, and average pooling to as
many, are trained by cross entropy for `scenes.STEPS` steps. Here the steps become five times as many; then VoCo
tokens start from the cells of a grid over the picture, each through a matrix of its own, as well as from their
embeddings (see `tokzip_jax.voco_start`); then the vision tower trains too. Each change is made on top of those before
it, at one learning rate and with three seeds. One token is also trained from cells for ten times the steps, without
the tower. Pooling has five times the steps, without and with the tower, and no row of ten times.
"""

import dataclasses

from configs import scenes
from tokzip_jax import config as c
from tokzip_jax.config_io import to_config_dict

LONGER = 5
CELLS = 4  # along a side of 8 patches
GRIDS = {1: 1, 4: 2}  # tokens -> side of the grid that pooling makes as many with
# What each stage adds to the one before, and how its rows are called.
CHANGES = {"steps": f"{LONGER} times the steps", "cells": "cells", "tower": "tower"}
TOWER = ("vit/.*",)


def get_config(pictures="runs/scenes"):
    """The config as an editable ConfigDict; `pictures` is the workdir of the study."""
    return to_config_dict(run_config(pictures))


def run_config(pictures: str = "runs/scenes") -> c.RunConfig:
    """The config as dataclasses."""
    given, trained, table = scenes.run_config(), stages(pictures), rows(pictures)
    return dataclasses.replace(
        given,
        model=dataclasses.replace(given.model, voco_cells=CELLS),
        data=dataclasses.replace(given.data, tokenizer=f"{pictures}/tokenizer.json"),
        stages=trained,
        rows=table,
        eval=dataclasses.replace(given.eval, order=tuple(table)),
        study=c.StudyConfig(stages=tuple(name for name in trained if name != "base"), seeds=(0, 1, 2)),
    )


def stages(pictures: str) -> dict[str, c.StageConfig]:
    """The uncompressed model, taken over by a step at learning rate 0, and each recipe with one change more."""
    origin = f"{pictures}/checkpoints/base"
    still = dataclasses.replace(scenes.OPTIM, learning_rate=0.0, warmup_steps=0, weight_decay=0.0)
    table = {"base": dataclasses.replace(scenes.towers()["base"], init_from=origin, steps=1, optim=still)}
    for count, grid in GRIDS.items():
        plain, pool = scenes.voco(count), scenes.pooled(grid)
        plain, pool = (dataclasses.replace(stage, steps=LONGER * stage.steps) for stage in (plain, pool))
        cells = dataclasses.replace(plain, method=dataclasses.replace(plain.method, voco_start="cells"))
        table |= {
            f"steps{count}": plain,
            f"cells{count}": cells,
            f"tower{count}": dataclasses.replace(cells, train=(*cells.train, *TOWER)),
            f"pooled{count}": pool,
            f"pooledtower{count}": dataclasses.replace(pool, train=(*pool.train, *TOWER)),
        }
    table["longer1"] = dataclasses.replace(table["cells1"], steps=2 * LONGER * scenes.STEPS)
    return table


def rows(pictures: str = "runs/scenes") -> dict[str, c.RowConfig]:
    """The table, top to bottom."""
    table = {
        "question-only prior": c.RowConfig(stage=""),
        "lower": c.RowConfig(method=c.MethodConfig(voco=1, voco_mask="voco")),
    }
    trained = stages(pictures)
    for count in GRIDS:
        named = {f"VoCo {count} + {name}": f"{change}{count}" for change, name in CHANGES.items()}
        named |= {f"VoCo 1 + cells + {2 * LONGER} times the steps": "longer1"} if count == 1 else {}
        pooling = f"average pooling {count} + {CHANGES['steps']}"
        named |= {pooling: f"pooled{count}", f"average pooling {count} + tower": f"pooledtower{count}"}
        table |= {name: c.RowConfig(stage=stage, method=trained[stage].method) for name, stage in named.items()}
    return {**table, "upper": c.RowConfig()}
