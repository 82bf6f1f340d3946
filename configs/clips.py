"""The study of clips: short videos, frame by frame in VoCo tokens, read in true order, shuffled, and one frame alone.

    python train.py --config=configs/clips.py --workdir=runs/clips

It starts from finished runs of `configs/scenes.py` and `configs/clips_pictures.py` in `runs/scenes` and
`runs/clips_pictures` (`--config=configs/clips.py:DIR` names another directory that holds the two): the picture models
of 1, 2 and 8 VoCo tokens, which start from the cells of a grid over the picture, go on with clips of four frames. A
frame's tokens see that frame alone, and all frames' tokens stand in the order of time, one behind the other, as
`tokzip_jax.video` caches them. Beside them average pooling to as many tokens a frame, from picture models of the same
grids, and from the uncompressed model all tokens of all frames, or of the middle frame.

Every model is read in true order and with the frames shuffled. What tells is the accuracy by type: whoever reads all
frames and cannot know in which order they came answers a question of type "order" or "direction" at best right every
second time, and "count" loses less. The tokens, cache and prefill of the table are those of all frames that are read.

All see the same clips for as many steps at the same learning rate (found with two VoCo tokens), with three seeds. What
goes on from the uncompressed model has had fewer steps in all. Give the command twice to use two CPU cores.

Two x86-64 CPU cores: its 24 trainings make 163 minutes of one (2026-11-30). Expect, of the questions about order, 88 %
with one VoCo token a frame, 91 with all 64, 44 to 47 with shuffled frames; of all questions 74, 77 and 79 % with 1, 2
and 8 VoCo tokens a frame, 72, 75 and 79 with as many of average pooling, and 78 with all.
"""

import dataclasses

from configs import clips_pictures, scenes, scenes_best
from tokzip_jax import config as c
from tokzip_jax.config_io import to_config_dict
from tokzip_jax.study import Variant

FRAMES = 4
STEPS = 1400


def get_config(runs="runs"):
    """The config as an editable ConfigDict; `runs` is the directory of the workdirs that it goes on from."""
    return to_config_dict(run_config(runs))


def run_config(runs: str = "runs") -> c.RunConfig:
    """The config as dataclasses."""
    trained, table = stages(runs), rows()
    given = scenes_best.run_config(f"{runs}/scenes")
    data = dataclasses.replace(
        given.data,
        name="clips",
        images=FRAMES,
        text_length=128,
        targets=32,
        scenes=c.ScenesConfig(difficulty="easy", frames=FRAMES, questions=6, train=16000, validation=300, test=400),
    )
    return dataclasses.replace(
        given,
        data=data,
        stages=trained,
        rows=table,
        eval=c.EvalConfig(batch_size=64, order=tuple(table)),
        study=c.StudyConfig(stages=tuple(trained)),
    )


def voco(count: int) -> c.MethodConfig:
    """`count` VoCo tokens a frame, at the positions of a streamed cache."""
    return dataclasses.replace(clips_pictures.voco(count), positions="compact")


def stages(runs: str) -> dict[str, c.StageConfig]:
    """Everything that is compared."""
    frames = c.StageConfig(
        init_from=f"{runs}/scenes/checkpoints/base",
        steps=STEPS,
        batch_size=8,
        train=("projector/.*", "llm/.*"),
        optim=scenes.OPTIM,
    )

    def goes_on(name: str, **changes) -> c.StageConfig:
        """From the picture model of the same name."""
        origin = Variant(name, scenes.OPTIM.learning_rate, clips_pictures.SEED).name
        return dataclasses.replace(frames, init_from=f"{runs}/clips_pictures/checkpoints/{origin}", **changes)

    table = {"uncompressed": frames, "middle": dataclasses.replace(frames, frame_order="middle")}
    for count in clips_pictures.LADDER:
        table[f"voco{count}"] = goes_on(f"voco{count}", train=scenes.LANGUAGE_MODEL, method=voco(count))
        table[f"pooled{count}"] = goes_on(f"pooled{count}", method=clips_pictures.pooled(count))
    return table


def rows() -> dict[str, c.RowConfig]:
    """The table, top to bottom."""
    read = {}
    for count in clips_pictures.LADDER:
        read[f"VoCo {count} + cells"] = c.RowConfig(stage=f"voco{count}", method=voco(count))
        read[f"average pooling {count}"] = c.RowConfig(stage=f"pooled{count}", method=clips_pictures.pooled(count))
    untrained = c.MethodConfig(voco=1, voco_mask="voco", positions="compact")
    table = {
        "question-only prior": c.RowConfig(stage=""),
        "lower": c.RowConfig(stage="uncompressed", method=untrained),
        "middle frame": c.RowConfig(stage="middle", frame_order="middle"),
    }
    for name, row in read.items():
        table[name] = row
        table[f"{name}, shuffled"] = dataclasses.replace(row, frame_order="shuffled")
    upper = c.RowConfig(stage="uncompressed")
    return {**table, "upper, shuffled": dataclasses.replace(upper, frame_order="shuffled"), "upper": upper}
