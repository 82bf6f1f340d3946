"""The picture models that `configs/clips.py` goes on from: VoCo tokens by the best recipe on drawn scenes, and pooling.

    python train.py --config=configs/clips_pictures.py --workdir=runs/clips_pictures

It starts from the uncompressed model of a run of `configs/scenes.py` in `runs/scenes`
(`--config=configs/clips_pictures.py:DIR` names another one). A picture becomes 1, 2 or 8 VoCo tokens that start from
the cells of a grid over it, as in `configs/scenes_best.py` and for as many steps, or as many tokens of average pooling
and a fresh linear layer. One seed, at the learning rate that all of those stages but one VoCo token (1e-3) were best
at; what compares methods is `configs/scenes_best.py`. Give the command twice to use two CPU cores.

One x86-64 CPU core: 22 minutes (2026-11-30, drawing of the pictures included). Expect 85, 93 and 98 % with 1, 2 and 8
VoCo tokens, and 81, 89 and 96 with as many of average pooling.
"""

import dataclasses

from configs import scenes, scenes_best
from tokzip_jax import config as c
from tokzip_jax.config_io import to_config_dict
from tokzip_jax.voco_start import parts

STEPS = scenes_best.LONGER * scenes.STEPS
LADDER = (1, 2, 8)
SEED = 0


def get_config(pictures="runs/scenes"):
    """The config as an editable ConfigDict; `pictures` is the workdir of the study."""
    return to_config_dict(run_config(pictures))


def run_config(pictures: str = "runs/scenes") -> c.RunConfig:
    """The config as dataclasses."""
    given = scenes_best.run_config(pictures)
    trained, table = stages(), rows()
    return dataclasses.replace(
        given,
        stages={"base": given.stages["base"], **trained},
        rows=table,
        eval=dataclasses.replace(given.eval, order=tuple(table)),
        study=c.StudyConfig(stages=tuple(trained), seeds=(SEED,)),
    )


def voco(count: int) -> c.MethodConfig:
    """`count` VoCo tokens of a picture, from the cells of a grid over it."""
    return c.MethodConfig(voco=count, voco_mask="voco", voco_start="cells")


def pooled(count: int) -> c.MethodConfig:
    """As many tokens of average pooling and a linear layer, over the parts that VoCo tokens start from."""
    down, across = parts(count)
    return c.MethodConfig(projector="avgpool_linear", pool_rows=down, pool_grid=across)


def stages() -> dict[str, c.StageConfig]:
    """What is trained."""
    table = {}
    for count in LADDER:
        table[f"voco{count}"] = scenes.voco(count, steps=STEPS, method=voco(count))
        table[f"pooled{count}"] = dataclasses.replace(scenes.pooled(1), steps=STEPS, method=pooled(count))
    return table


def rows() -> dict[str, c.RowConfig]:
    """The table, top to bottom."""
    table = {
        "question-only prior": c.RowConfig(stage=""),
        "lower": c.RowConfig(method=c.MethodConfig(voco=1, voco_mask="voco")),
    }
    for count in LADDER:
        table[f"VoCo {count} + cells"] = c.RowConfig(stage=f"voco{count}", method=voco(count))
        table[f"average pooling {count}"] = c.RowConfig(stage=f"pooled{count}", method=pooled(count))
    return {**table, "upper": c.RowConfig()}
