r"""VisionZip's efficient tuning (arXiv 2412.04467) of LLaVA-1.5 7B: only the projector is trained.

    python train.py --config=configs/visionzip_tune_llava15_7b.py --workdir=DIR \
        --config.stages.tuned.init_from=PATH --config.data.data_dir=MIX665K --config.data.tokenizer=TOKENIZER

The budget is the argument: `configs/visionzip_tune_llava15_7b.py:192` or `:128`, 64 without one (54 dominant, the CLS
token among them, and 10 contextual). PATH holds the converted parameters of LLaVA-1.5 7B. MIX665K holds `llava.json`
(its instruction mix) beside a folder `images/`, TOKENIZER is Vicuna's `tokenizer.json`.

As published: vision tower and language model frozen, a tenth of the mix (here: the first tenth of one shuffled epoch;
which tenth the authors took is not known), ordinary next-token loss. Learning rate and schedule are **not published**;
the authors say that they used LLaVA's scripts unchanged, so the defaults here are those of its instruction tuning:
2e-5, cosine after 3 % warm-up, no weight decay, 128 rows a step, at most 2048 positions a row.

Hardware: TPU or GPUs with 28 GB in all for the parameters in float32, and room for activations. Published: 30 minutes
on 8 GPUs of 80 GB; averages over eleven benchmarks 99.1 / 98.4 / 95.2 % of the uncompressed model with 192 / 128 / 64
tokens (98.5 / 97.6 / 94.0 % without tuning). **Not run here**: neither time nor numbers are ours, only shapes,
shardings and the traced step are tested.
"""

import math

from tokzip_jax import config as c
from tokzip_jax.config_io import to_config_dict

EXAMPLES = 665_298 // 10  # a tenth of the instruction mix
POSITIONS = 2048
BATCH = 128
CONTEXTUAL = {192: 30, 128: 20, 64: 10}  # the paper's budgets, and how many of their tokens are contextual
CHECKPOINT = "checkpoints/llava_v15_7b"  # no such file is shipped: give yours


def get_config(tokens: str = "64"):
    """The config as an editable ConfigDict; `tokens` is the budget."""
    return to_config_dict(run_config(int(tokens)))


def run_config(tokens: int = 64) -> c.RunConfig:
    """The config as dataclasses.

    Raises:
        ValueError: a budget that the paper does not have.
    """
    if tokens not in CONTEXTUAL:
        raise ValueError(f"a budget of {tokens} tokens is none of the paper's: {', '.join(map(str, CONTEXTUAL))}")
    steps = math.ceil(EXAMPLES / BATCH)
    return c.RunConfig(
        platform="accelerator",
        model=c.ModelConfig(dtype="bfloat16", remat="full"),
        data=c.DataConfig(
            name="llava_json_system_first",
            data_dir="data/llava_mix665k",
            tokenizer="data/llava_mix665k/tokenizer.json",
            text_length=POSITIONS - tokens + 1,  # the picture's placeholder is one of the text's ids
            workers=8,
        ),
        stages={
            "tuned": c.StageConfig(
                init_from=CHECKPOINT,
                steps=steps,
                batch_size=BATCH,
                train=("projector/.*",),
                method=c.MethodConfig(encoder="visionzip", tokens=tokens, options={"contextual": CONTEXTUAL[tokens]}),
                loss=c.LossConfig(chunk=8192),
                optim=c.OptimConfig(learning_rate=2e-5, warmup_steps=math.ceil(0.03 * steps)),
            ),
        },
        log_every=10,
        checkpoint_every=100,
    )
