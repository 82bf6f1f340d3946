"""The study: one token for a picture, or a few. Every way to train VoCo tokens beside pooling, on drawn scenes.

    python train.py --config=configs/scenes.py --workdir=runs/scenes

A vision tower learns to tell captions apart (stage "clip"), a language model to answer from it ("base"). All other
stages start from that checkpoint, see the same data for as many steps and train the same language model: each at three
learning rates, of which the validation split chooses one, then with three seeds, then for as long as the one-token VoCo
training takes. Killed, the same command goes on where it was. Given twice, once behind `taskset -c 0` and once behind
`taskset -c 1`, two cores do more than with the threads of one process.

Two x86-64 CPU cores: more than three hours, of which 72 minutes for the 82 trainings and 80 to 110 for the base model
(2026-11-22; `docs/results/scenes` holds a base model as an archive). Expect an upper bound of 96 to 98 %, 82 % with
one VoCo token and 80 with one of average pooling, 88 and 87 with four, and a question-only prior of 35.
"""

import dataclasses

from tokzip_jax import config as c
from tokzip_jax.config_io import to_config_dict

STEPS = 600
LADDER = (1, 2, 4, 8)
LANGUAGE_MODEL = ("projector/.*", "llm/.*", "voco/.*")
THRESHOLDS = {"strict": 0.01, "middling": 0.1, "loose": 0.5}  # of k=auto: nats that the answer may change by
BUDGETS = (2, 3, 4, 6, 8, 16)  # of the rows that select


def get_config():
    """The config as an editable ConfigDict."""
    return to_config_dict(run_config())


def run_config() -> c.RunConfig:
    """The config as dataclasses."""
    trained = studied()
    table = rows()
    return c.RunConfig(
        model=c.ModelConfig(
            vit=c.VitConfig(image_size=64, patch_size=8, width=96, layers=4, heads=3, mlp_dim=288, window=2),
            llm=c.LlmConfig(
                vocab_size=512, width=96, layers=4, heads=6, kv_heads=6, head_dim=16, mlp_dim=256, max_positions=512
            ),
            voco_embeddings=8,
            contrast_dim=64,
        ),
        data=c.DataConfig(
            name="scenes",
            vocab_size=512,
            text_length=104,
            targets=24,
            caption_length=12,
            scenes=c.ScenesConfig(difficulty="easy", captions="partial", train=60000),
        ),
        stages={**towers(), **trained},
        rows=table,
        eval=c.EvalConfig(batch_size=64, order=tuple(table), pictures=3),
        study=c.StudyConfig(
            stages=tuple(trained), learning_rates=(1e-3, 2e-3, 4e-3), seeds=(0, 1, 2), equal_time="voco1", limit=500
        ),
        log_every=50,
        checkpoint_every=300,
    )


OPTIM = c.OptimConfig(
    method="muon", learning_rate=2e-3, warmup_steps=50, b2=0.98, weight_decay=0.01, final_fraction=0.02
)


def towers() -> dict[str, c.StageConfig]:
    """The vision tower against captions, then the uncompressed model, in which the tower goes on learning."""
    visible = c.MethodConfig(voco=8)
    return {
        "clip": c.StageConfig(
            steps=600,
            batch_size=32,
            train=("vit/.*", "contrast/.*", "llm/embed/table"),
            method=visible,
            loss=c.LossConfig(ce=0.0, contrast=1.0),
            optim=OPTIM,
        ),
        "base": c.StageConfig(
            init_from="clip",
            steps=7000,
            batch_size=16,
            method=visible,
            voco_counts=(0, 1, 0, 8),
            token_dropout=0.15,
            loss=c.LossConfig(contrast=0.1),
            optim=OPTIM,
        ),
    }


def voco(count: int, **changes) -> c.StageConfig:
    """A stage with VoCo tokens, `count` of them where nothing else is said."""
    method = c.MethodConfig(voco=count, voco_mask="voco")
    stage = c.StageConfig(
        init_from="base", steps=STEPS, batch_size=8, train=LANGUAGE_MODEL, method=method, optim=OPTIM
    )
    return dataclasses.replace(stage, **changes)


def pooled(grid: int) -> c.StageConfig:
    """Average pooling and a linear layer: grid x grid tokens."""
    method = c.MethodConfig(projector="avgpool_linear", pool_grid=grid)
    return voco(0, train=("projector/.*", "llm/.*"), method=method)


def studied() -> dict[str, c.StageConfig]:
    """Everything that is compared."""
    frozen = c.LossConfig(kl=1.0)
    own = c.LossConfig(kl=1.0, teacher="self")
    # EPIC's consistency: the model itself teaches, with more VoCo tokens. The last fifth is trained at one token.
    growing = c.ProgressiveConfig(site="voco", final_low=1.0, final_high=1.0)
    return {
        **{f"voco{count}": voco(count) for count in LADDER},
        "kl": voco(1, loss=frozen),
        "own": voco(1, loss=own),
        "onepass": voco(1, loss=dataclasses.replace(own, teacher_ce=1.0)),
        "progressive": voco(8, loss=own, progressive=growing),
        "elastic": voco(8, voco_counts=LADDER, voco_draw="row"),
        "pooled1": pooled(1),
        "pooled4": pooled(2),
    }


def rows() -> dict[str, c.RowConfig]:
    """The table, top to bottom."""

    def read(count: int) -> c.MethodConfig:
        return c.MethodConfig(voco=count, voco_mask="voco")

    def choosing(threshold: float) -> c.RowConfig:
        auto = c.AutoConfig(ladder=LADDER, threshold=threshold, per="picture")
        return c.RowConfig(stage="elastic", method=read(8), auto=auto)

    def grid(side: int) -> c.MethodConfig:
        return c.MethodConfig(projector="avgpool_linear", pool_grid=side)

    table = {
        "question-only prior": c.RowConfig(stage=""),
        "lower": c.RowConfig(method=read(1)),
        "VoCo 1": c.RowConfig(stage="voco1", method=read(1)),
        "VoCo 1 + KL to the frozen model": c.RowConfig(stage="kl", method=read(1)),
        "VoCo 1 + KL to itself": c.RowConfig(stage="own", method=read(1)),
        "VoCo 1 + KL to itself + its loss": c.RowConfig(stage="onepass", method=read(1)),
        "VoCo 1 progressive": c.RowConfig(stage="progressive", method=read(1)),
        "average pooling 1": c.RowConfig(stage="pooled1", method=grid(1)),
        **{f"VoCo {count}": c.RowConfig(stage=f"voco{count}", method=read(count)) for count in LADDER[1:]},
        "average pooling 4": c.RowConfig(stage="pooled4", method=grid(2)),
        **{f"elastic {count}": c.RowConfig(stage="elastic", method=read(count)) for count in LADDER},
        **{f"k=auto {name}": choosing(threshold) for name, threshold in THRESHOLDS.items()},
    }
    for tokens in (4, 8, 16):
        merging = c.MethodConfig(encoder="visionzip", tokens=tokens, options={"contextual": tokens // 4})
        table[f"VisionZip {tokens}"] = c.RowConfig(method=merging)
    for tokens in BUDGETS:
        highest, lowest = (
            c.MethodConfig(encoder="cls_attention", tokens=tokens, options={"order": order})
            for order in ("highest", "lowest")
        )
        table[f"highest CLS attention {tokens}"] = c.RowConfig(method=highest)
        table[f"random {tokens}"] = c.RowConfig(method=c.MethodConfig(encoder="random", tokens=tokens), seeds=3)
        table[f"lowest CLS attention {tokens}"] = c.RowConfig(method=lowest)
    return {
        **table,
        "uncompressed after VoCo": c.RowConfig(stage="voco1"),
        "upper_official": c.RowConfig(method=c.MethodConfig(voco=1)),
        "upper": c.RowConfig(),
    }
