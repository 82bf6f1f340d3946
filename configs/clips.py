"""The study of clips: short videos, frame by frame in VoCo tokens, read in true order, shuffled, and one frame alone.

    python train.py --config=configs/clips.py --workdir=runs/clips

It starts from a finished run of `configs/scenes.py` in `runs/scenes` (`--config=configs/clips.py:DIR` names another
one): with its tokenizer, its picture models of 1, 2 and 8 VoCo tokens go on with clips of four frames. A frame's tokens
see that frame alone, and all frames' tokens stand in the order of time, one behind the other, as `tokzip_jax.video`
caches them. Beside them average pooling to as many tokens a frame, from the picture models of 1 and 4 pooled tokens
(one linear layer does for any grid), and from the uncompressed model all tokens of all frames, or of the middle frame.

Every model is read in true order and with the frames shuffled. What tells is the accuracy by type: whoever cannot know
in which order the frames came answers a question of type "order" or "direction" at best right every second time, and
"count" loses less. The tokens, cache and prefill of the table are those of all frames that are read.

All see the same clips for as many steps, with one seed, at one learning rate: of those tried on pictures the one at
which 1 and 2 VoCo tokens were best there. What goes on from the uncompressed model has had fewer steps in all. Give the
command twice to use two CPU cores.
"""

import dataclasses
import json
import pathlib

from configs import scenes
from tokzip_jax import config as c
from tokzip_jax.config_io import to_config_dict
from tokzip_jax.study import Variant

FRAMES = 4
STEPS = 2000
GRIDS = {1: (1, 1), 2: (1, 2), 8: (2, 4)}  # tokens of a frame -> rows and columns of as large a pooled grid
ORIGINS = {1: 1, 2: 1, 8: 4}  # ... -> tokens of the picture model that pooling begins from


def get_config(pictures="runs/scenes"):
    """The config as an editable ConfigDict; `pictures` is the workdir of the picture study."""
    return to_config_dict(run_config(pictures))


def run_config(pictures: str = "runs/scenes") -> c.RunConfig:
    """The config as dataclasses."""
    trained, table = stages(pictures), rows()
    given = scenes.run_config()
    data = dataclasses.replace(
        given.data,
        name="clips",
        tokenizer=f"{pictures}/tokenizer.json",
        images=FRAMES,
        text_length=128,
        targets=32,
        scenes=c.ScenesConfig(difficulty="easy", frames=FRAMES, questions=6, train=6000, validation=300, test=400),
    )
    return dataclasses.replace(
        given,
        data=data,
        stages=trained,
        rows=table,
        eval=c.EvalConfig(batch_size=64, order=tuple(table)),
        study=c.StudyConfig(stages=tuple(trained), seeds=(0,)),
    )


def picture_model(pictures: str, stage: str, row: str) -> str:
    """The checkpoint of a stage of the picture study: its first seed, at the learning rate that its row was chosen at.

    Before that study has a summary the name is a guess, and a run then says that there is no such checkpoint.
    """
    summary = pathlib.Path(pictures, "eval", "summary.json")
    found = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else []
    rates = {line["method"]: line.get("learning_rate") for line in found}
    return f"{pictures}/checkpoints/{Variant(stage, rates.get(row) or scenes.OPTIM.learning_rate, 0).name}"


def voco(count: int) -> c.MethodConfig:
    """`count` VoCo tokens a frame, at the positions of a streamed cache."""
    return c.MethodConfig(voco=count, voco_mask="voco", positions="compact")


def pooled(count: int) -> c.MethodConfig:
    """As many tokens of average pooling and a linear layer."""
    down, across = GRIDS[count]
    return c.MethodConfig(projector="avgpool_linear", pool_rows=down, pool_grid=across)


def stages(pictures: str) -> dict[str, c.StageConfig]:
    """Everything that is compared."""
    frames = c.StageConfig(
        init_from=f"{pictures}/checkpoints/base",
        steps=STEPS,
        batch_size=8,
        train=("projector/.*", "llm/.*"),
        optim=scenes.OPTIM,
    )
    table = {"uncompressed": frames, "middle": dataclasses.replace(frames, frame_order="middle")}
    for count in GRIDS:
        table[f"voco{count}"] = dataclasses.replace(
            frames,
            init_from=picture_model(pictures, f"voco{count}", f"VoCo {count}"),
            train=scenes.LANGUAGE_MODEL,
            method=voco(count),
        )
        origin = picture_model(pictures, f"pooled{ORIGINS[count]}", f"average pooling {ORIGINS[count]}")
        table[f"pooled{count}"] = dataclasses.replace(frames, init_from=origin, method=pooled(count))
    return table


def rows() -> dict[str, c.RowConfig]:
    """The table, top to bottom."""
    read = {}
    for count in GRIDS:
        read[f"VoCo {count}"] = c.RowConfig(stage=f"voco{count}", method=voco(count))
        read[f"average pooling {count}"] = c.RowConfig(stage=f"pooled{count}", method=pooled(count))
    table = {
        "question-only prior": c.RowConfig(stage=""),
        "lower": c.RowConfig(stage="uncompressed", method=voco(1)),
        "middle frame": c.RowConfig(stage="middle", frame_order="middle"),
    }
    for name, row in read.items():
        table[name] = row
        table[f"{name}, shuffled"] = dataclasses.replace(row, frame_order="shuffled")
    upper = c.RowConfig(stage="uncompressed")
    return {**table, "upper, shuffled": dataclasses.replace(upper, frame_order="shuffled"), "upper": upper}
