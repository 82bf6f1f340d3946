"""How far one token comes on drawn scenes: ten times the study's steps, for VoCo from cells and for pooling.

    python train.py --config=configs/scenes_limit.py --workdir=runs/scenes_limit

It starts from the uncompressed model of a run of `configs/scenes.py` in `runs/scenes`
(`--config=configs/scenes_limit.py:DIR` names another one), and trains one VoCo token that starts from the cells of a
grid over the picture, and one token of average pooling, as `configs/scenes_best.py` does, only longer. Three seeds, at
the learning rate in the middle of those tried there. Give the command twice to use two CPU cores.
"""

import dataclasses

from configs import scenes, scenes_best
from tokzip_jax import config as c
from tokzip_jax.config_io import to_config_dict

LONGEST = 10  # times the study's steps
NAMES = {"cells1": "VoCo 1 + cells", "pooled1": "average pooling 1"}


def get_config(pictures="runs/scenes"):
    """The config as an editable ConfigDict; `pictures` is the workdir of the study."""
    return to_config_dict(run_config(pictures))


def run_config(pictures: str = "runs/scenes") -> c.RunConfig:
    """The config as dataclasses."""
    given = scenes_best.run_config(pictures)
    trained = {name: dataclasses.replace(given.stages[name], steps=LONGEST * scenes.STEPS) for name in NAMES}
    wanted = ("question-only prior", "lower", *NAMES.values(), "upper")
    table = {name: row for name, row in given.rows.items() if name in wanted}
    return dataclasses.replace(
        given,
        stages={"base": given.stages["base"], **trained},
        rows=table,
        eval=dataclasses.replace(given.eval, order=tuple(table)),
        study=c.StudyConfig(stages=tuple(trained)),
    )
