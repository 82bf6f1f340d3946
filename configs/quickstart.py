"""From nothing to a table on real data: VoCo and VisionZip on easy-VQA.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart

Two CPU cores: 14 min 3 s (2026-11-21, x86-64, nothing else on the machine).

A vision tower of four layers (the language model reads the third) learns to tell captions apart (stage "clip"); a
language model of three layers learns to answer from it ("base"); then VoCo tokens and average pooling + linear start
from that checkpoint. The tower is frozen after its own stage. Expect an upper bound of 94 to 96 %, VoCo with one
token at more than 90 % retention, and VisionZip far above random selection; the README shows a whole table.
"""

import dataclasses

from tokzip_jax import config as c
from tokzip_jax.config_io import to_config_dict

BUDGETS = {4: 1, 8: 2, 16: 4}  # VisionZip: tokens, and how many of them are contextual
LANGUAGE_MODEL = ("projector/.*", "llm/.*", "voco/.*")


def get_config():
    """The config as an editable ConfigDict."""
    return to_config_dict(run_config())


def run_config() -> c.RunConfig:
    """The config as dataclasses."""
    return c.RunConfig(
        model=c.ModelConfig(
            # Windows of two patches: what a patch says is about its place, so that it matters which ones are kept.
            vit=c.VitConfig(image_size=64, patch_size=8, width=96, layers=4, heads=3, mlp_dim=288, window=2),
            llm=c.LlmConfig(
                vocab_size=384, width=96, layers=3, heads=3, kv_heads=3, head_dim=32, mlp_dim=256, max_positions=512
            ),
            voco_embeddings=4,
            contrast_dim=64,
        ),
        data=c.DataConfig(vocab_size=384, text_length=112, targets=40, caption_length=8),
        stages=stages(),
        rows=rows(),
        eval=c.EvalConfig(batch_size=64, order=tuple(rows())),
        log_every=20,
        checkpoint_every=100,
    )


def stages() -> dict[str, c.StageConfig]:
    """The vision tower against captions, the uncompressed model, then each trained compressor from it."""
    optim = c.OptimConfig(learning_rate=1e-3, warmup_steps=50, b2=0.98, weight_decay=0.01, final_fraction=0.02)
    faster = dataclasses.replace(optim, learning_rate=2e-3)
    visible = c.MethodConfig(voco=4)
    return {
        # The CLS token must mean something before its attention can select: here it learns to tell captions apart.
        "clip": c.StageConfig(
            steps=1000,
            batch_size=32,
            train=("vit/.*", "contrast/.*", "llm/embed/table"),
            method=visible,
            loss=c.LossConfig(ce=0.0, contrast=1.0),
            optim=optim,
        ),
        # A quarter of the pictures lose tokens, so that the training-free rows are judged by what they keep and not by
        # a number of tokens that the language model never met.
        "base": c.StageConfig(
            init_from="clip",
            steps=1800,
            batch_size=16,
            train=LANGUAGE_MODEL,
            method=visible,
            voco_counts=(0, 1, 0, 4),
            token_dropout=0.25,
            optim=faster,
        ),
        "voco": c.StageConfig(
            init_from="base",
            steps=1400,
            batch_size=8,
            train=LANGUAGE_MODEL,
            method=c.MethodConfig(voco=4, voco_mask="voco"),
            voco_counts=(1, 1, 4),
            optim=optim,
        ),
        "pooled": c.StageConfig(
            init_from="base",
            steps=1400,
            batch_size=8,
            train=("projector/.*", "llm/.*"),
            method=c.MethodConfig(projector="avgpool_linear", pool_grid=1),
            optim=optim,
        ),
    }


def rows() -> dict[str, c.RowConfig]:
    """The table, top to bottom."""
    table = {
        "question-only prior": c.RowConfig(stage=""),
        "lower": c.RowConfig(method=c.MethodConfig(voco=1, voco_mask="voco")),
        "VoCo 1": c.RowConfig(stage="voco", method=c.MethodConfig(voco=1, voco_mask="voco")),
        "VoCo 4": c.RowConfig(stage="voco", method=c.MethodConfig(voco=4, voco_mask="voco")),
        "average pooling 1": c.RowConfig(
            stage="pooled", method=c.MethodConfig(projector="avgpool_linear", pool_grid=1)
        ),
    }
    for tokens, contextual in BUDGETS.items():
        method = c.MethodConfig(encoder="visionzip", tokens=tokens, options={"contextual": contextual})
        table[f"VisionZip {tokens}"] = c.RowConfig(method=method)
    for tokens in BUDGETS:
        table[f"random {tokens}"] = c.RowConfig(method=c.MethodConfig(encoder="random", tokens=tokens), seeds=3)
    return {
        **table,
        "uncompressed after VoCo": c.RowConfig(stage="voco"),
        "upper_official": c.RowConfig(method=c.MethodConfig(voco=1)),
        "upper": c.RowConfig(),
    }
