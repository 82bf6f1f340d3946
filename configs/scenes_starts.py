"""What VoCo tokens and pooling begin from: the controls of `configs/scenes_best.py`, by its rules, on drawn scenes.

    python train.py --config=configs/scenes_starts.py --workdir=runs/scenes_starts

There VoCo tokens that start from the cells of a grid differ in two ways from those that start from an embedding: they
begin from the picture at all, and from its places, by weights of their own. Here they begin from the mean of their
part alone. And average pooling has a fresh linear layer there, while VoCo goes on with the base model's projector;
here the patches are pooled in front of that projector, in a 2 x 2 grid (where one token is made, the two kinds of
pooling are level after 300 steps: `docs/results/scenes_methods`). Three learning rates, three seeds, as many steps,
and a column at the training time of one token from cells, which is timed for that and not trained. Give the command
twice to use two CPU cores.

One x86-64 CPU core: 58 minutes (2026-11-30). Expect 83 % with one token from a mean and 96 with four, and 95 with four
of average pooling in front of the base's projector (96 after the same time).
"""

import dataclasses

from configs import scenes_best
from tokzip_jax import config as c
from tokzip_jax.config_io import to_config_dict

NAMES = {
    "mean1": "VoCo 1 + the mean of its part",
    "mean4": "VoCo 4 + the mean of its part",
    "kept4": "average pooling 4, the base's projector",
}


def get_config(pictures="runs/scenes"):
    """The config as an editable ConfigDict; `pictures` is the workdir of the study."""
    return to_config_dict(run_config(pictures))


def run_config(pictures: str = "runs/scenes") -> c.RunConfig:
    """The config as dataclasses."""
    given, trained = scenes_best.run_config(pictures), stages()
    read = {name: c.RowConfig(stage=stage, method=trained[stage].method) for stage, name in NAMES.items()}
    prior, lower, upper = (given.rows[name] for name in ("question-only prior", "lower", "upper"))
    table = {"question-only prior": prior, "lower": lower, **read, "upper": upper}
    return dataclasses.replace(
        given,
        stages={name: given.stages[name] for name in ("base", given.study.equal_time)} | trained,
        rows=table,
        eval=dataclasses.replace(given.eval, order=tuple(table)),
        study=dataclasses.replace(given.study, stages=tuple(trained)),
    )


def stages() -> dict[str, c.StageConfig]:
    """What is compared."""
    given = scenes_best.stages()
    table = {}
    for count in (1, 4):
        voco = given[f"voco{count}"]
        table[f"mean{count}"] = dataclasses.replace(voco, method=dataclasses.replace(voco.method, voco_start="pooled"))
    kept = c.MethodConfig(projector="pool_mlp", factor=4)  # of 8 patches along a side
    return {**table, "kept4": dataclasses.replace(given["pooled4"], method=kept)}
