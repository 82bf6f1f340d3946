"""The best recipe for VoCo tokens that was found on drawn scenes, change by change.

    python train.py --config=configs/scenes_best.py --workdir=runs/scenes_best

It starts from the uncompressed model of a finished run of `configs/scenes.py` in `runs/scenes`
(`--config=configs/scenes_best.py:DIR` names another one), where one and four VoCo tokens are trained by cross entropy
for `scenes.STEPS` steps. Here they start from pooled patches as well as from their embeddings; then the steps become
three times as many; then a KL term to the frozen uncompressed model joins; then the vision tower trains too. Each
change is made on top of those before it, at one learning rate and with three seeds.
"""

import dataclasses

from configs import scenes
from tokzip_jax import config as c
from tokzip_jax.config_io import to_config_dict

LONGER = 3
COUNTS = (1, 4)
# What each stage adds to the one before, and how its rows are called.
CHANGES = {"start": "pooled start", "steps": f"{LONGER} times the steps", "kl": "KL", "tower": "tower"}


def get_config(pictures="runs/scenes"):
    """The config as an editable ConfigDict; `pictures` is the workdir of the study."""
    return to_config_dict(run_config(pictures))


def run_config(pictures: str = "runs/scenes") -> c.RunConfig:
    """The config as dataclasses."""
    given, trained, table = scenes.run_config(), stages(pictures), rows()
    return dataclasses.replace(
        given,
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
    for count in COUNTS:
        stage = scenes.voco(count)
        stage = dataclasses.replace(stage, method=dataclasses.replace(stage.method, voco_start="pooled"))
        table[f"start{count}"] = stage
        table[f"steps{count}"] = stage = dataclasses.replace(stage, steps=LONGER * stage.steps)
        table[f"kl{count}"] = stage = dataclasses.replace(stage, loss=c.LossConfig(kl=1.0))
        table[f"tower{count}"] = dataclasses.replace(stage, train=(*stage.train, "vit/.*"))
    return table


def rows() -> dict[str, c.RowConfig]:
    """The table, top to bottom."""
    table = {
        "question-only prior": c.RowConfig(stage=""),
        "lower": c.RowConfig(method=c.MethodConfig(voco=1, voco_mask="voco")),
    }
    for count in COUNTS:
        method = c.MethodConfig(voco=count, voco_mask="voco", voco_start="pooled")
        table |= {
            f"VoCo {count} + {name}": c.RowConfig(stage=f"{change}{count}", method=method)
            for change, name in CHANGES.items()
        }
    return {**table, "upper": c.RowConfig()}
