"""Checks across config fields, before anything is compiled: one sentence with the key and its valid range."""

import math
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from typing import Any

from tokzip_jax import (
    attention,
    decoder_site,
    distill,
    elastic,
    encoder_site,
    layers,
    layout,
    lora,
    masks,
    progressive,
    projectors,
    stack,
    vlm,
)
from tokzip_jax.config import DataConfig, MethodConfig, ModelConfig, RowConfig, RunConfig, StageConfig
from tokzip_jax.data import shapes
from tokzip_jax.projectors import PROJECTORS, weights_name

DTYPES = ("float32", "bfloat16", "float16")
PLATFORMS = ("", "cpu", "gpu", "tpu", "accelerator")


def validate(cfg: RunConfig) -> None:
    """Check a whole run.

    Raises:
        ValueError: the first thing that cannot work, as one sentence naming the key, its value and what is valid.
    """
    _one_of("platform", cfg.platform, PLATFORMS)
    _at_least("log_every", cfg.log_every, 1)
    _at_least("checkpoint_every", cfg.checkpoint_every, 1)
    _model(cfg.model)
    _data(cfg.data, cfg.model)
    for axis in ("data", "model"):
        size = getattr(cfg.mesh, axis)
        _require(size == -1 or size >= 1, f"mesh.{axis} = {size} must be >= 1, or -1 for all remaining devices")
    _require(cfg.mesh.data != -1 or cfg.mesh.model != -1, "mesh.data and mesh.model cannot both be -1")
    stage_order(cfg)
    for name, stage in cfg.stages.items():
        _stage(f"stages.{name}", stage, cfg)
    for name, row in cfg.rows.items():
        _at_least(f"rows.{name}.seeds", row.seeds, 1)
        if not row.stage:  # the question-only prior: no parameters, no pictures
            continue
        _one_of(f"rows.{name}.stage", row.stage, sorted(cfg.stages))
        check_method(f"rows.{name}.method", row.method, cfg.model)
        _same_projector(f"rows.{name}", row, cfg)
        _fits(f"rows.{name}.method", row.method, cfg)
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
        _require(
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


def check_method(key: str, method: MethodConfig, model: ModelConfig) -> None:
    """Check one method against a model; `key` is its dotted place in the config, for the message."""
    _one_of(f"{key}.projector", method.projector, sorted(PROJECTORS))
    _one_of(f"{key}.voco_mask", method.voco_mask, sorted(masks.TABLES))
    encoder_site.check(key, model, method)
    projectors.check(key, model, method)
    limit = model.voco_embeddings if model.voco_embeddings > 1 else math.inf
    _require(
        0 <= method.voco <= limit,
        f"{key}.voco = {method.voco} must lie between 0 and model.voco_embeddings = {model.voco_embeddings}"
        if limit < math.inf
        else f"{key}.voco = {method.voco} must be >= 0",
    )
    _require(
        method.voco > 0 or method.voco_mask == "visible",
        f"{key}.voco = 0 with the VoCo mask {method.voco_mask!r} would hide every picture from the text; "
        "use voco >= 1, or voco_mask='visible'",
    )
    try:
        decoder_site.check(method, vlm.visual_slots(model, method), model.llm)
    except ValueError as error:
        raise ValueError(f"{key}.{error}") from None
    _one_of(f"{key}.positions", method.positions, ("original", "compact"))
    _require(
        method.positions == "original" or method.voco_mask == "voco",
        f"{key}.positions = 'compact' needs {key}.voco_mask = 'voco', under which text sees VoCo tokens alone, not "
        f"{method.voco_mask!r}",
    )


def _same_projector(key: str, row: RowConfig, cfg: RunConfig) -> None:
    """A row has to run on the parameters that its stage trains, and on no more queries than it trains."""
    method, trained = row.method, cfg.stages[row.stage].method
    _require(
        weights_name(method.projector) == weights_name(trained.projector),
        f"{key}.method.projector = {method.projector!r} is not what stage {row.stage!r} trains; it must "
        f"be {trained.projector!r}, or {key}.stage another stage",
    )
    _require(not method.draw_budget, f"{key}.method.draw_budget = True is for training; a row needs a fixed budget")
    most = trained.queries or cfg.model.projector.queries
    _require(
        method.projector != "mqt" or (method.queries or cfg.model.projector.queries) <= most,
        f"{key}.method.queries = {method.queries} (0 = all) is more than stage {row.stage!r} trains; it must lie "
        f"between 1 and {most}",
    )


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _one_of(key: str, value: Any, names: Iterable[str]) -> None:
    names = list(names)
    choices = ", ".join(repr(name) for name in names)
    _require(value in names, f"{key} = {value!r} is unknown; choose one of {choices or '(there is none)'}")


def _at_least(key: str, value: float, least: float) -> None:
    _require(least <= value < math.inf, f"{key} = {value} must be >= {least} and finite")


def _within(key: str, value: float, low: float, high: float) -> None:
    _require(low <= value <= high, f"{key} = {value} must lie between {low} and {high}")


def _model(model: ModelConfig) -> None:
    vit, llm = model.vit, model.llm
    for name in ("image_size", "patch_size", "width", "layers", "heads", "mlp_dim"):
        _at_least(f"model.vit.{name}", getattr(vit, name), 1)
    for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "mlp_dim", "max_positions"):
        _at_least(f"model.llm.{name}", getattr(llm, name), 1)
    _require(
        vit.image_size % vit.patch_size == 0,
        f"model.vit.image_size = {vit.image_size} must be a multiple of model.vit.patch_size = {vit.patch_size}",
    )
    _require(
        vit.window == 0 or (vit.window > 0 and vit.grid % vit.window == 0),
        f"model.vit.window = {vit.window} must be 0 or divide the {vit.grid} patches of a picture's side",
    )
    _require(
        vit.width % vit.heads == 0,
        f"model.vit.heads = {vit.heads} must divide model.vit.width = {vit.width}",
    )
    _require(
        llm.heads % llm.kv_heads == 0,
        f"model.llm.kv_heads = {llm.kv_heads} must divide model.llm.heads = {llm.heads}",
    )
    _require(llm.head_dim % 2 == 0, f"model.llm.head_dim = {llm.head_dim} must be even (rotary positions turn pairs)")
    _within("model.vit.feature_layer", vit.feature_layer, -vit.layers, -1)
    _one_of("model.vit.activation", vit.activation, sorted(layers.ACTIVATIONS))
    _require(
        model.attention != "splash",
        "model.attention = 'splash' is no setting of a run, whose rows hold different questions and no static layout; "
        "where all rows have one layout, give llm.run_layers(attention=...) splash.attend with a splash.mask",
    )
    _one_of("model.attention", model.attention, sorted(attention.IMPLEMENTATIONS))
    _one_of("model.remat", model.remat, ["none", *sorted(stack.POLICIES)])
    for name in ("param_dtype", "dtype", "logits_dtype"):
        _one_of(f"model.{name}", getattr(model, name), DTYPES)
    _at_least("model.voco_embeddings", model.voco_embeddings, 1)
    _at_least("model.contrast_dim", model.contrast_dim, 0)


def _data(data: DataConfig, model: ModelConfig) -> None:
    _one_of("data.on_error", data.on_error, ("skip", "raise"))
    for name, least in (("images", 1), ("questions", 0), ("caption_length", 1), ("workers", 0)):
        _at_least(f"data.{name}", getattr(data, name), least)
    # BOS, the two placeholders of every image, and at least question, answer and end of one question.
    _at_least("data.text_length", data.text_length, 1 + 2 * data.images + 3)
    _within("data.targets", data.targets, 0, data.text_length)
    _scenes(data)
    if not data.tokenizer:
        _within("data.vocab_size", data.vocab_size, 5, model.llm.vocab_size)


def _scenes(data: DataConfig) -> None:
    """Settings of the drawn data sets; checked whichever data set is read, since a typing error is one anyway."""
    scenes, frames = data.scenes, data.scenes.frames
    _one_of("data.scenes.difficulty", scenes.difficulty, list(shapes.LEVELS))
    _one_of("data.scenes.frame_order", scenes.frame_order, ("true", "shuffled", "middle"))
    _one_of("data.scenes.captions", scenes.captions, ("full", "partial"))
    _within("data.scenes.size", scenes.size, 32, 1024)  # below, shapes cannot be told apart
    _within("data.scenes.frames", frames, 3, 32)
    _at_least("data.scenes.seed", scenes.seed, 0)
    for name in ("train", "validation", "test", "questions"):
        _at_least(f"data.scenes.{name}", getattr(scenes, name), 1)
    _require(
        data.name != "clips" or scenes.frame_order == "middle" or data.images >= frames,
        f"data.images = {data.images} is too small for clips of data.scenes.frames = {frames}; give {frames}",
    )


def _stage(key: str, stage: StageConfig, cfg: RunConfig) -> None:
    loss, optim = stage.loss, stage.optim
    for name in ("steps", "batch_size"):
        _at_least(f"{key}.{name}", getattr(stage, name), 1)
    _at_least(f"{key}.optim.accumulate", optim.accumulate, 1)
    _require(
        stage.batch_size % optim.accumulate == 0,
        f"{key}.batch_size = {stage.batch_size} must be a multiple of {key}.optim.accumulate = {optim.accumulate}",
    )
    _require(bool(stage.train), f"{key}.train is empty; name at least one pattern of parameters to train")
    _within(f"{key}.optim.warmup_steps", optim.warmup_steps, 0, stage.steps)
    _within(f"{key}.optim.final_fraction", optim.final_fraction, 0, 1)
    _within(f"{key}.token_dropout", stage.token_dropout, 0, 1)
    for name in ("learning_rate", "weight_decay", "clip_norm"):
        _at_least(f"{key}.optim.{name}", getattr(optim, name), 0)
    for name in ("b1", "b2"):
        value = getattr(optim, name)
        _require(0 <= value < 1, f"{key}.optim.{name} = {value} must be >= 0 and below 1")
    for name in ("ce", "kl", "teacher_ce", "contrast"):
        _at_least(f"{key}.loss.{name}", getattr(loss, name), 0)
    _require(
        loss.ce + loss.kl + loss.teacher_ce + loss.contrast > 0,
        f"{key}.loss: ce, kl, teacher_ce and contrast are all 0; nothing would train",
    )
    _require(loss.temperature > 0, f"{key}.loss.temperature = {loss.temperature} must be above 0")
    _at_least(f"{key}.loss.chunk", loss.chunk, 1)
    _require(
        loss.contrast == 0 or cfg.model.contrast_dim > 0,
        f"{key}.loss.contrast = {loss.contrast} needs model.contrast_dim >= 1",
    )
    lora.check_config(f"{key}.lora", stage.lora)
    origin = cfg.stages.get(stage.init_from)
    _require(
        origin is None or not origin.lora.rank or origin.lora == stage.lora,
        f"{key}.lora must be stages.{stage.init_from}.lora, the deltas in the checkpoint that it begins from; or begin "
        "from a path with them merged (lora.export)",
    )
    check_method(f"{key}.method", stage.method, cfg.model)
    least = 0 if stage.method.voco_mask == "visible" else 1
    for count in stage.voco_counts:
        _require(
            least <= count <= stage.method.voco,
            f"{key}.voco_counts holds {count}; with voco_mask={stage.method.voco_mask!r} every count must lie "
            f"between {least} and {key}.method.voco = {stage.method.voco}",
        )
    distill.check(key, stage)
    elastic.check_draw(key, stage)
    progressive.check(key, stage, cfg.model)
    _require(
        stage.method.positions == "original" or not distill.shares_a_pass(stage.loss, stage.progressive.site),
        f"{key}.method.positions = 'compact' lays pictures over one another for a teacher that reads them in the "
        "student's pass; it must be 'original'",
    )
    for method in (stage.method, *progressive.all_methods(stage)):
        _fits(f"{key}.method", method, cfg)


def _fits(key: str, method: MethodConfig, cfg: RunConfig) -> None:
    reader = vlm.reads_question(method)
    _require(
        not reader or cfg.data.questions == 1,
        f"{key}.{reader} reads the question, and a picture has one set of tokens in a row: data.questions = "
        f"{cfg.data.questions} must be 1",
    )
    _require(
        method.decoder == "none" or cfg.data.questions == 1,
        f"data.questions = {cfg.data.questions} must be 1 for {key}.decoder = {method.decoder!r}, which chooses tokens "
        "by the one question of a row",
    )
    visual = vlm.visual_slots(cfg.model, method)
    # Under compact positions visual tokens take no ids, but each picture has to fit by itself.
    seen, alone = (visual, 0) if method.positions == "original" else (1, visual + method.voco)
    length = layout.slots(cfg.data.text_length, images=cfg.data.images, visual=seen, voco=method.voco)
    length = max(length, alone)
    _require(
        length <= cfg.model.llm.max_positions,
        f"model.llm.max_positions = {cfg.model.llm.max_positions} is too small for {key}: data.text_length = "
        f"{cfg.data.text_length} with {cfg.data.images} x ({visual} visual + {method.voco} VoCo) tokens needs {length}",
    )


def _eval(cfg: RunConfig) -> None:
    _at_least("eval.batch_size", cfg.eval.batch_size, 1)
    _at_least("eval.limit", cfg.eval.limit, 0)
    _at_least("eval.pictures", cfg.eval.pictures, 0)
    if cfg.rows:
        for name in ("upper", "lower"):
            _one_of(f"eval.{name}", getattr(cfg.eval, name), sorted(cfg.rows))
        for name in cfg.eval.order:
            _one_of("eval.order entry", name, sorted(cfg.rows))


def _study(cfg: RunConfig) -> None:
    study = cfg.study
    for name in study.stages:
        _one_of("study.stages entry", name, sorted(cfg.stages))
        _require(
            not any(stage.init_from == name for stage in cfg.stages.values()),
            f"study.stages holds {name!r}, of which there will be several trainings, but a stage begins from it; "
            "take it out of study.stages, or begin from another stage",
        )
        _require(
            any(row.stage == name and not row.auto.ladder for row in cfg.rows.values()),
            f"study.stages holds {name!r}, which no row with a fixed number of tokens reads: nothing can choose "
            "its learning rate by; add such a row",
        )
    for key in ("stages", "learning_rates", "seeds"):
        values = getattr(study, key)
        _require(len(set(values)) == len(values), f"study.{key} = {values} holds an entry twice")
    _require(bool(study.seeds), "study.seeds is empty; give at least one")
    for seed in study.seeds:
        _at_least("study.seeds entry", seed, 0)
    for rate in study.learning_rates:
        _require(0 < rate < math.inf, f"study.learning_rates entry = {rate} must be above 0 and finite")
    _one_of("study.equal_time", study.equal_time, ["", *study.stages])
    _at_least("study.limit", study.limit, 0)
