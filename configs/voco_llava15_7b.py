r"""VoCo-LLaMA (arXiv 2406.12275) at full size: CLIP ViT-L/14-336 and Vicuna v1.5 7B, one VoCo token a picture.

    python train.py --config=configs/voco_llava15_7b.py --workdir=DIR \
        --config.stages.voco.init_from=PATH --config.data.data_dir=MIX665K --config.data.tokenizer=TOKENIZER

`configs/voco_llava15_7b.py:2` trains two tokens, and so on. PATH holds converted parameters: Vicuna v1.5 7B, CLIP's
vision tower and the projector that LLaVA-1.5 7B was pretrained with on 558k captions. MIX665K holds `llava.json` (the
instruction mix of LLaVA-1.5) beside a folder `images/`, TOKENIZER is Vicuna's `tokenizer.json`.

The recipe is the official script's: the vision tower frozen, everything else trained; cross entropy under the VoCo
mask; AdamW, 2e-5, cosine after 3 % warm-up, no weight decay, clipping at 1; 128 rows a step, two epochs; at most 2048
positions a row; picture first, system sentence behind the VoCo tokens.

Hardware: TPU or GPUs with 110 GB in all for parameters, gradients and moments in float32, and room for activations: 8 x
80 GB should do (`--config.stages.voco.optim.accumulate=4` halves the activations). The authors trained on 8 GPUs of 40
GB in bfloat16.
Published at one token: GQA 57.0, MMBench 58.8, MME 1323, POPE 81.4, SEED 53.7, SQA 65.4, VQAv2 72.3, retention 83.7 %
(two tokens 87.8 % over four of them). **Not run here**: neither time nor numbers are ours, only shapes, shardings and
the traced step are tested. Nobody has reproduced the numbers in public.
"""

import math

from tokzip_jax import config as c
from tokzip_jax.config_io import to_config_dict

EXAMPLES = 665_298  # of the instruction mix, text-only ones included
POSITIONS = 2048
BATCH, EPOCHS = 128, 2
CHECKPOINT = "checkpoints/vicuna_7b_clip_l336_projector_558k"  # no such file is shipped: give yours


def get_config(voco: str = "1"):
    """The config as an editable ConfigDict; `voco` is how many VoCo tokens a picture gets."""
    return to_config_dict(run_config(int(voco)))


def run_config(voco: int = 1) -> c.RunConfig:
    """The config as dataclasses."""
    steps = math.ceil(EPOCHS * EXAMPLES / BATCH)
    vit = c.VitConfig()
    return c.RunConfig(
        platform="accelerator",
        model=c.ModelConfig(vit=vit, llm=c.LlmConfig(), dtype="bfloat16", remat="full"),
        data=c.DataConfig(
            name="llava_json",
            data_dir="data/llava_mix665k",
            tokenizer="data/llava_mix665k/tokenizer.json",
            # The placeholders of picture and VoCo tokens are two of the text's ids.
            text_length=POSITIONS - vit.patches - voco + 2,
            workers=8,
        ),
        stages={
            "voco": c.StageConfig(
                init_from=CHECKPOINT,
                steps=steps,
                batch_size=BATCH,
                train=("projector/.*", "llm/.*", "voco/.*"),
                method=c.MethodConfig(voco=voco, voco_mask="voco"),
                loss=c.LossConfig(chunk=8192),
                optim=c.OptimConfig(learning_rate=2e-5, warmup_steps=math.ceil(0.03 * steps), accumulate=2),
            ),
        },
        log_every=10,
        checkpoint_every=500,
    )
