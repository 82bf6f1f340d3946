"""A whole recipe in miniature: what the tests start from, and the quickest look at a workdir.

    python train.py --config=configs/tiny.py --workdir=/tmp/tiny

Two CPU cores, under a minute after the first compile. Three stages of a few steps on 64-pixel easy-VQA pictures with a
two-layer language model: the table has every kind of row and its numbers mean nothing.
"""

from tokzip_jax import config as c
from tokzip_jax.config_io import to_config_dict


def get_config():
    """The config as an editable ConfigDict."""
    return to_config_dict(run_config())


def run_config() -> c.RunConfig:
    """The config as dataclasses."""
    visible = c.MethodConfig(voco=2)
    voco = c.MethodConfig(voco=2, voco_mask="voco")
    pooled = c.MethodConfig(projector="avgpool_linear", pool_grid=1)
    optim = c.OptimConfig(learning_rate=3e-3, warmup_steps=1)
    return c.RunConfig(
        model=c.ModelConfig(
            vit=c.VitConfig(image_size=64, patch_size=16, width=32, layers=3, heads=2, mlp_dim=64),
            llm=c.LlmConfig(
                vocab_size=320, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_dim=64, max_positions=256
            ),
            voco_embeddings=2,
            contrast_dim=16,
        ),
        data=c.DataConfig(vocab_size=320, text_length=64, caption_length=8),
        stages={
            "base": c.StageConfig(
                steps=6,
                batch_size=8,
                method=visible,
                voco_counts=(0, 1, 0, 2),
                loss=c.LossConfig(contrast=0.1),
                optim=optim,
            ),
            "voco": c.StageConfig(
                init_from="base",
                steps=4,
                batch_size=8,
                train=("projector/.*", "llm/.*", "voco/.*"),
                method=voco,
                voco_counts=(1, 2),
                loss=c.LossConfig(kl=1.0),
                optim=optim,
            ),
            "pooled": c.StageConfig(
                init_from="base",
                steps=4,
                batch_size=8,
                train=("projector/.*", "llm/.*"),
                method=pooled,
                optim=optim,
            ),
        },
        rows={
            "question-only prior": c.RowConfig(stage=""),
            "lower": c.RowConfig(stage="base", method=c.MethodConfig(voco=1, voco_mask="voco")),
            "VoCo 1": c.RowConfig(stage="voco", method=c.MethodConfig(voco=1, voco_mask="voco")),
            "average pooling 1": c.RowConfig(stage="pooled", method=pooled),
            "VisionZip 4": c.RowConfig(method=c.MethodConfig(encoder="visionzip", tokens=4, options={"contextual": 1})),
            "random 4": c.RowConfig(method=c.MethodConfig(encoder="random", tokens=4), seeds=2),
            "upper": c.RowConfig(stage="base"),
            "upper_official": c.RowConfig(stage="base", method=c.MethodConfig(voco=1)),
        },
        eval=c.EvalConfig(
            batch_size=8,
            limit=24,
            pictures=2,
            order=(
                "question-only prior",
                "lower",
                "VoCo 1",
                "average pooling 1",
                "VisionZip 4",
                "random 4",
                "upper",
                "upper_official",
            ),
        ),
        log_every=1,
        checkpoint_every=2,
    )
