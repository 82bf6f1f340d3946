"""Checks across config fields, before anything is compiled: one sentence with the key and its valid range."""

import math
from graphlib import CycleError, TopologicalSorter

from tokzip_jax import (
    attention,
    distill,
    elastic,
    layers,
    lora,
    method_check,
    progressive,
    stack,
)
from tokzip_jax.config import DataConfig, ModelConfig, RunConfig, StageConfig
from tokzip_jax.data import anyres, clips, shapes
from tokzip_jax.projectors import weights_name
from tokzip_jax.require import at_least, one_of, require, within

DTYPES = ("float32", "bfloat16", "float16")
PLATFORMS = ("", "cpu", "gpu", "tpu", "accelerator")


def validate(cfg: RunConfig) -> None:
    """Check a whole run.

    Raises:
        ValueError: the first thing that cannot work, as one sentence naming the key, its value and what is valid.
    """
    one_of("platform", cfg.platform, PLATFORMS)
    at_least("log_every", cfg.log_every, 1)
    at_least("checkpoint_every", cfg.checkpoint_every, 1)
    _model(cfg.model)
    _data(cfg.data, cfg.model)
    for axis in ("data", "model"):
        size = getattr(cfg.mesh, axis)
        require(size == -1 or size >= 1, f"mesh.{axis} = {size} must be >= 1, or -1 for all remaining devices")
    require(cfg.mesh.data != -1 or cfg.mesh.model != -1, "mesh.data and mesh.model cannot both be -1")
    stage_order(cfg)
    for name, stage in cfg.stages.items():
        require("/" not in name and name not in (".", ".."), f"the stage name {name!r} must do as the name of a folder")
        _stage(f"stages.{name}", stage, cfg)
    for name, row in cfg.rows.items():
        at_least(f"rows.{name}.seeds", row.seeds, 1)
        _frame_order(f"rows.{name}.frame_order", row.frame_order, cfg.data)
        if not row.stage:  # the question-only prior: no parameters, no pictures
            continue
        one_of(f"rows.{name}.stage", row.stage, sorted(cfg.stages))
        method_check.check(f"rows.{name}.method", row.method, cfg.model)
        method_check.same_projector(f"rows.{name}", row, cfg)
        method_check.fits(f"rows.{name}.method", row.method, cfg)
        elastic.check_auto(f"rows.{name}", row.auto, row.method)
    _eval(cfg)
    _study(cfg)


def stage_order(cfg: RunConfig) -> list[str]:
    """The stages in an order in which every `init_from` comes first; ties by name.

    An `init_from` is another stage, "" (fresh), or a path of converted parameters, recognised by a "/" in it.

    Raises:
        ValueError: an `init_from` that is no stage and no path, or a circle.
    """
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for name, stage in cfg.stages.items():
        origin = stage.init_from
        parents = [origin] if origin and "/" not in origin else []
        require(
            not parents or origin in cfg.stages,
            f"stages.{name}.init_from = {origin!r} is no stage; choose one of {', '.join(sorted(cfg.stages))}, "
            "\"\" for fresh parameters, or a path (with a '/')",
        )
        sorter.add(name, *parents)
    try:
        sorter.prepare()
    except CycleError as error:
        raise ValueError(f"init_from of the stages runs in a circle: {' -> '.join(error.args[1])}") from None
    order = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        order.extend(ready)
        sorter.done(*ready)
    return order


def deciding(cfg: RunConfig, stage: str) -> list[str]:
    """The rows that a study chooses a stage's learning rate by: of a fixed number of tokens, frames read as it does.

    Where there are such, those under the mask that it trains with.
    """
    trained, usual = cfg.stages[stage], cfg.data.scenes.frame_order
    order = trained.frame_order or usual
    fixed = {name: row for name, row in cfg.rows.items() if row.stage == stage and not row.auto.ladder}
    alike = {name: row for name, row in fixed.items() if (row.frame_order or usual) == order}
    return [name for name, row in alike.items() if row.method.voco_mask == trained.method.voco_mask] or list(alike)


def _model(model: ModelConfig) -> None:
    vit, llm = model.vit, model.llm
    for name in ("image_size", "patch_size", "width", "layers", "heads", "mlp_dim"):
        at_least(f"model.vit.{name}", getattr(vit, name), 1)
    for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "mlp_dim", "max_positions"):
        at_least(f"model.llm.{name}", getattr(llm, name), 1)
    require(
        vit.image_size % vit.patch_size == 0,
        f"model.vit.image_size = {vit.image_size} must be a multiple of model.vit.patch_size = {vit.patch_size}",
    )
    require(
        vit.window == 0 or (vit.window > 0 and vit.grid % vit.window == 0),
        f"model.vit.window = {vit.window} must be 0 or divide the {vit.grid} patches of a picture's side",
    )
    require(
        vit.width % vit.heads == 0,
        f"model.vit.heads = {vit.heads} must divide model.vit.width = {vit.width}",
    )
    require(
        llm.heads % llm.kv_heads == 0,
        f"model.llm.kv_heads = {llm.kv_heads} must divide model.llm.heads = {llm.heads}",
    )
    require(llm.head_dim % 2 == 0, f"model.llm.head_dim = {llm.head_dim} must be even (rotary positions turn pairs)")
    for key, value in (
        ("llm.rope_theta", llm.rope_theta),
        ("llm.norm_eps", llm.norm_eps),
        ("vit.norm_eps", vit.norm_eps),
    ):
        require(0 < value < math.inf, f"model.{key} = {value} must be above 0 and finite")
    within("model.vit.feature_layer", vit.feature_layer, -vit.layers, -1)
    one_of("model.vit.activation", vit.activation, sorted(layers.ACTIVATIONS))
    require(
        model.attention != "splash",
        "model.attention = 'splash' is no setting of a run, whose rows hold different questions and no static layout; "
        "where all rows have one layout, give llm.run_layers(attention=...) splash.attend with a splash.mask",
    )
    one_of("model.attention", model.attention, sorted(attention.IMPLEMENTATIONS))
    one_of("model.remat", model.remat, ["none", *sorted(stack.POLICIES)])
    for name in ("param_dtype", "dtype", "logits_dtype"):
        one_of(f"model.{name}", getattr(model, name), DTYPES)
    at_least("model.voco_embeddings", model.voco_embeddings, 1)
    within("model.voco_cells", model.voco_cells, 0, vit.grid)
    at_least("model.contrast_dim", model.contrast_dim, 0)


def _data(data: DataConfig, model: ModelConfig) -> None:
    one_of("data.on_error", data.on_error, ("skip", "raise"))
    for name, least in (("images", 1), ("questions", 0), ("caption_length", 1), ("workers", 0)):
        at_least(f"data.{name}", getattr(data, name), least)
    anyres.check(data.tiles, data.images, data.name)
    # BOS, the two placeholders of every image, and at least question, answer and end of one question.
    at_least("data.text_length", data.text_length, 1 + 2 * data.images + 3)
    within("data.targets", data.targets, 0, data.text_length)
    at_least("data.held_out", data.held_out, 0)
    require(
        data.held_out == 0 or data.name == "easy_vqa",
        f"data.held_out = {data.held_out} must be 0: only easy_vqa is cut into a training and a validation split",
    )
    _scenes(data)
    if not data.tokenizer:
        within("data.vocab_size", data.vocab_size, 5, model.llm.vocab_size)


def _scenes(data: DataConfig) -> None:
    """Settings of the drawn data sets; checked whichever data set is read, since a typing error is one anyway."""
    scenes, frames = data.scenes, data.scenes.frames
    one_of("data.scenes.difficulty", scenes.difficulty, list(shapes.LEVELS))
    one_of("data.scenes.frame_order", scenes.frame_order, clips.ORDERS)
    one_of("data.scenes.captions", scenes.captions, ("full", "partial"))
    within("data.scenes.size", scenes.size, 32, 1024)  # below, shapes cannot be told apart
    within("data.scenes.frames", frames, 3, 32)
    at_least("data.scenes.seed", scenes.seed, 0)
    for name in ("train", "validation", "test", "questions"):
        at_least(f"data.scenes.{name}", getattr(scenes, name), 1)
    require(
        data.name != "clips" or scenes.frame_order == "middle" or data.images >= frames,
        f"data.images = {data.images} is too small for clips of data.scenes.frames = {frames}; give {frames}",
    )


def _frame_order(key: str, order: str, data: DataConfig) -> None:
    """How a stage or a row reads clips."""
    if not order:
        return
    one_of(key, order, clips.ORDERS)
    require(
        data.name == "clips",
        f"{key} = {order!r} is for the frames of data.name = 'clips'; with {data.name!r} leave it at ''",
    )
    _scenes(clips.reading(data, order))


def _stage(key: str, stage: StageConfig, cfg: RunConfig) -> None:
    loss, optim = stage.loss, stage.optim
    _frame_order(f"{key}.frame_order", stage.frame_order, cfg.data)
    for name in ("steps", "batch_size"):
        at_least(f"{key}.{name}", getattr(stage, name), 1)
    one_of(f"{key}.optim.method", optim.method, ("adamw", "muon"))
    at_least(f"{key}.optim.accumulate", optim.accumulate, 1)
    require(
        stage.batch_size % optim.accumulate == 0,
        f"{key}.batch_size = {stage.batch_size} must be a multiple of {key}.optim.accumulate = {optim.accumulate}",
    )
    require(bool(stage.train), f"{key}.train is empty; name at least one pattern of parameters to train")
    within(f"{key}.optim.warmup_steps", optim.warmup_steps, 0, stage.steps)
    within(f"{key}.optim.final_fraction", optim.final_fraction, 0, 1)
    within(f"{key}.token_dropout", stage.token_dropout, 0, 1)
    for name in ("learning_rate", "weight_decay", "clip_norm"):
        at_least(f"{key}.optim.{name}", getattr(optim, name), 0)
    for name in ("b1", "b2"):
        value = getattr(optim, name)
        require(0 <= value < 1, f"{key}.optim.{name} = {value} must be >= 0 and below 1")
    for name in ("ce", "kl", "teacher_ce", "contrast"):
        at_least(f"{key}.loss.{name}", getattr(loss, name), 0)
    part = stage.batch_size // optim.accumulate
    require(
        loss.contrast == 0 or part > 1,
        f"{key}.loss.contrast = {loss.contrast} needs pictures to tell apart: batch_size / optim.accumulate is {part}",
    )
    require(
        loss.ce + loss.kl + loss.teacher_ce + loss.contrast > 0,
        f"{key}.loss: ce, kl, teacher_ce and contrast are all 0; nothing would train",
    )
    require(loss.temperature > 0, f"{key}.loss.temperature = {loss.temperature} must be above 0")
    at_least(f"{key}.loss.chunk", loss.chunk, 1)
    require(
        loss.contrast == 0 or cfg.model.contrast_dim > 0,
        f"{key}.loss.contrast = {loss.contrast} needs model.contrast_dim >= 1",
    )
    lora.check_config(f"{key}.lora", stage.lora)
    origin = cfg.stages.get(stage.init_from)
    require(
        origin is None or not origin.lora.rank or origin.lora == stage.lora,
        f"{key}.lora must be stages.{stage.init_from}.lora, the deltas in the checkpoint that it begins from; or begin "
        "from a path with them merged (lora.export)",
    )
    method_check.check(f"{key}.method", stage.method, cfg.model)
    least = 0 if stage.method.voco_mask == "visible" else 1
    for count in stage.voco_counts:
        require(
            least <= count <= stage.method.voco,
            f"{key}.voco_counts holds {count}; with voco_mask={stage.method.voco_mask!r} every count must lie "
            f"between {least} and {key}.method.voco = {stage.method.voco}",
        )
    distill.check(key, stage)
    elastic.check_draw(key, stage)
    progressive.check(key, stage, cfg.model)
    cut = stage.progressive.site == "decoder" and stage.loss.kl > 0 and stage.loss.teacher == "frozen"
    own, given = stage.method.projector, origin.method.projector if origin else "mlp2x_gelu"
    require(
        not cut or weights_name(own) == weights_name(given),
        f"{key}.progressive.site = 'decoder' cuts what {key}.method.projector = {own!r} makes, and the frozen "
        f"teacher's projector is {given!r}: they must be the same, or {key}.loss.teacher = 'self'",
    )
    require(
        stage.method.positions == "original" or not distill.shares_a_pass(stage.loss, stage.progressive.site),
        f"{key}.method.positions = {stage.method.positions!r} moves pictures away from where a teacher reads them in "
        "the student's pass; it must be 'original'",
    )
    for method in (stage.method, *progressive.all_methods(stage, cfg.model)):
        method_check.fits(f"{key}.method", method, cfg)


def _eval(cfg: RunConfig) -> None:
    at_least("eval.batch_size", cfg.eval.batch_size, 1)
    at_least("eval.limit", cfg.eval.limit, 0)
    at_least("eval.pictures", cfg.eval.pictures, 0)
    if cfg.rows:
        for name in ("upper", "lower"):
            one_of(f"eval.{name}", getattr(cfg.eval, name), sorted(cfg.rows))
        for name in cfg.eval.order:
            one_of("eval.order entry", name, sorted(cfg.rows))


def _study(cfg: RunConfig) -> None:
    study = cfg.study
    for name in study.stages:
        one_of("study.stages entry", name, sorted(cfg.stages))
        require(
            not any(stage.init_from == name for stage in cfg.stages.values()),
            f"study.stages holds {name!r}, of which there will be several trainings, but a stage begins from it; "
            "take it out of study.stages, or begin from another stage",
        )
        require(
            bool(deciding(cfg, name)),
            f"study.stages holds {name!r}, which no row with a fixed number of tokens reads in its order of frames: "
            "nothing can choose its learning rate; add such a row",
        )
    require(
        not study.stages or len(study.learning_rates) < 2 or study.split != cfg.eval.split,
        f"study.split = {study.split!r} would choose learning rates on what eval.split measures; give another one",
    )
    for key in ("stages", "learning_rates", "seeds"):
        values = getattr(study, key)
        require(len(set(values)) == len(values), f"study.{key} = {values} holds an entry twice")
    require(bool(study.seeds), "study.seeds is empty; give at least one")
    for seed in study.seeds:
        at_least("study.seeds entry", seed, 0)
    for rate in study.learning_rates:
        require(0 < rate < math.inf, f"study.learning_rates entry = {rate} must be above 0 and finite")
    # A stage that only says how long a training takes is timed and not trained: nothing may need its checkpoint.
    one_of("study.equal_time", study.equal_time, ["", *cfg.stages] if study.stages else [""])
    needed = {stage.init_from for stage in cfg.stages.values()} | {row.stage for row in cfg.rows.values()}
    require(
        study.equal_time in ("", *study.stages) or study.equal_time not in needed,
        f"study.equal_time = {study.equal_time!r} would be timed and not trained, but a stage begins from it or a row "
        "reads it; add it to study.stages, or name another stage",
    )
    at_least("study.limit", study.limit, 0)
