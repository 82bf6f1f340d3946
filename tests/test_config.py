"""Config: round trips, messages of bad input, cross-field checks, stage order."""

import copy
import dataclasses
import pickle
import sys

import hypothesis
import ml_collections
import pytest
from absl import app, flags
from hypothesis import strategies as st
from ml_collections import config_flags

from tokzip_jax import config_check, config_io
from tokzip_jax.config import (
    AutoConfig,
    DataConfig,
    EvalConfig,
    LlmConfig,
    LossConfig,
    MeshConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    RowConfig,
    RunConfig,
    StageConfig,
    VitConfig,
)
from tokzip_jax.options import Options

VIT = VitConfig(image_size=32, patch_size=8, width=16, layers=2, heads=2, mlp_dim=32)
LLM = LlmConfig(vocab_size=64, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp_dim=32, max_positions=128)
VOCO = MethodConfig(voco=1, voco_mask="voco")
PLAIN = MethodConfig(voco=0, voco_mask="visible")
CFG = RunConfig(
    model=ModelConfig(vit=VIT, llm=LLM, contrast_dim=8),
    data=DataConfig(text_length=32, vocab_size=64),
    stages={
        "base": StageConfig(method=PLAIN, batch_size=8),
        "voco": StageConfig(init_from="base", method=VOCO, loss=LossConfig(kl=1.0), voco_counts=(1,)),
    },
    rows={"upper": RowConfig(stage="base", method=PLAIN), "lower": RowConfig(stage="base", method=VOCO)},
    eval=EvalConfig(order=("lower", "upper")),
)


def change(cfg, key, value):
    """A copy of a frozen config tree with the leaf at a dotted key replaced."""
    first, _, rest = key.partition(".")
    if isinstance(cfg, dict):
        return {**cfg, first: change(cfg[first], rest, value) if rest else value}
    return dataclasses.replace(cfg, **{first: change(getattr(cfg, first), rest, value) if rest else value})


def test_round_trips():
    tree = config_io.to_config_dict(CFG)
    assert isinstance(tree, ml_collections.ConfigDict)
    assert tree.stages.voco.voco_counts == (1,)
    assert config_io.from_config_dict(tree) == CFG
    assert config_io.from_json(config_io.to_json(CFG)) == CFG
    assert config_io.from_config_dict({}) == RunConfig()


def test_options_of_a_method():
    """They hash, compare, travel as JSON and ConfigDict, cannot change, and a plain dict becomes them."""
    method = MethodConfig(encoder="visionzip", tokens=6, options={"contextual": 2, "merge": "paper"})
    assert method == MethodConfig(encoder="visionzip", tokens=6, options=Options(merge="paper", contextual=2))
    assert hash(method) == hash(copy.deepcopy(method)) == hash(pickle.loads(pickle.dumps(method)))
    assert method != dataclasses.replace(method, options={"contextual": 2})
    for change_it in (
        lambda options: options.update(contextual=3),
        lambda options: options.__setitem__("contextual", 3),
        lambda options: options.pop("contextual"),
    ):
        with pytest.raises(TypeError, match=r"options of a config cannot change; make new ones: Options\("):
            change_it(method.options)
    cfg = change(CFG, "rows.upper.method", method)
    assert config_io.from_json(config_io.to_json(cfg)) == cfg
    tree = config_io.to_config_dict(cfg)
    assert config_io.from_config_dict(tree) == cfg
    tree.rows.upper.method.options.contextual = 3
    assert config_io.from_config_dict(tree).rows["upper"].method.options == {"contextual": 3, "merge": "paper"}
    changed = config_io.difference(cfg, config_io.from_config_dict(tree))
    assert changed == ["rows.upper.method.options.contextual: 2 -> 3"]
    for wrong, message in (
        (3, r"rows\.upper\.method\.options = 3 must be a group of keys"),
        ({"contextual": (1, 2)}, r"options\.contextual = \(1, 2\) must be a number, a word, True or False"),
    ):
        with pytest.raises(ValueError, match=message):
            config_io.from_config_dict({"rows": {"upper": {"method": {"options": wrong}}}})


@hypothesis.given(
    steps=st.integers(1, 10**6),
    rate=st.floats(0, 1),
    counts=st.lists(st.integers(0, 8), max_size=4),
    name=st.text(max_size=8),
)
@hypothesis.settings(max_examples=30, deadline=None)
def test_json_round_trip_keeps_every_value(steps, rate, counts, name):
    stage = StageConfig(steps=steps, voco_counts=tuple(counts), init_from=name, optim=OptimConfig(learning_rate=rate))
    cfg = RunConfig(stages={"s": stage})
    assert config_io.from_json(config_io.to_json(cfg)) == cfg


def test_optional_fields_are_typed_placeholders():
    @dataclasses.dataclass(frozen=True)
    class Part:
        size: int | None = None

    tree = config_io.to_config_dict(Part())
    assert config_io.from_config_dict(tree, Part) == Part()
    tree.size = 3
    assert config_io.from_config_dict(tree, Part) == Part(size=3)
    with pytest.raises(TypeError):
        tree.size = "three"
    with pytest.raises(ValueError, match=r"size = 'x' \(str\) must be int or None"):
        config_io.from_config_dict({"size": "x"}, Part)


def test_strings_from_the_command_line_are_parsed():
    cfg = config_io.from_config_dict(
        {
            "seed": "7",
            "model": {"llm": {"tied_head": "true"}},
            "stages": {"a": {"voco_counts": "1,2", "train": "voco/.*", "optim": {"learning_rate": 1}}},
        }
    )
    assert cfg.seed == 7
    assert cfg.model.llm.tied_head is True
    assert cfg.stages["a"].voco_counts == (1, 2)
    assert cfg.stages["a"].train == ("voco/.*",)
    assert cfg.stages["a"].optim.learning_rate == 1.0
    assert isinstance(cfg.stages["a"].optim.learning_rate, float)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"sed": 1}, ["unknown config key sed;", "did you mean seed or study?", "Valid keys there: seed, platform"]),
        (
            {"stages": {"a": {"optim": {"learning_rte": 1.0}}}},
            ["stages.a.optim.learning_rte", "did you mean stages.a.optim.learning_rate?", "clip_norm"],
        ),
        ({"seed": True}, ["seed = True (bool) must be int"]),
        ({"seed": 1.5}, ["seed = 1.5 (float) must be int"]),
        ({"seed": "x"}, ["seed = 'x' (str) must be int"]),
        ({"model": {"llm": {"tied_head": 1}}}, ["model.llm.tied_head = 1 (int) must be bool"]),
        ({"stages": {"a": {"optim": {"b1": True}}}}, ["stages.a.optim.b1 = True (bool) must be float"]),
        ({"stages": {"a": {"steps": None}}}, ["stages.a.steps = None (NoneType) must be int"]),
        ({"stages": {"a": {"voco_counts": (1, 2.5)}}}, ["stages.a.voco_counts", "must be a tuple of int"]),
        ({"stages": 3}, ["stages = 3 must be a group of keys"]),
        ({"data": "easy_vqa"}, ["data = 'easy_vqa' must be a group of keys"]),
    ],
)
def test_bad_keys_and_types_are_named(tree, words):
    with pytest.raises(ValueError) as error:
        config_io.from_config_dict(ml_collections.ConfigDict(tree))
    for word in words:
        assert word in str(error.value)


# ml_collections 1.1 loads a config file this way; it is a warning of theirs.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_overrides_on_the_command_line(tmp_path, monkeypatch):
    file = tmp_path / "config.py"
    file.write_text(
        "from tokzip_jax import config, config_io\n"
        "def get_config():\n"
        "    return config_io.to_config_dict(config.RunConfig(stages={'a': config.StageConfig()}))\n"
    )

    def parse(*overrides):
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values, lock_config=False, accept_new_attributes=True)
        monkeypatch.setattr(app, "parse_flags_with_usage", values)
        argv = ["train.py", f"--config={file}", *overrides]
        monkeypatch.setattr(sys, "argv", argv)
        config_io.parse_flags(argv)
        return config_io.from_config_dict(values.config)

    cfg = parse("--config.stages.a.steps=7", "--config.stages.a.voco_counts=(1,2)")
    assert cfg.stages["a"].steps == 7
    assert cfg.stages["a"].voco_counts == (1, 2)
    method = "--config.stages.a.method."
    options = (f"{method}options.contextual=3", f"{method}options.merge=paper", f"{method}options.restore=0.5")
    cfg = parse(f"{method}encoder=visionzip", *options)
    assert cfg.stages["a"].method.options == {"contextual": 3, "merge": "paper", "restore": 0.5}
    with pytest.raises(ValueError, match=r"unknown config key data\.text_lenght; did you mean data\.text_length"):
        parse("--config.data.text_lenght=3")
    with pytest.raises(SystemExit, match=r"error: unknown config key dat\.workers: there is no 'dat'\. .*\"data\""):
        parse("--config.dat.workers=3")


def test_difference_names_what_changed():
    assert config_io.difference(CFG, CFG) == []
    other = change(change(CFG, "model.vit.width", 32), "seed", 3)
    assert config_io.difference(CFG, other) == ["model.vit.width: 16 -> 32", "seed: 0 -> 3"]
    fewer = dataclasses.replace(CFG, rows={"upper": CFG.rows["upper"]})
    assert "rows.lower.seeds: 1 -> (absent)" in config_io.difference(CFG, fewer)


def test_a_good_config_passes():
    config_check.validate(CFG)
    config_check.validate(RunConfig())
    config_check.validate(change(CFG, "rows", {**CFG.rows, "prior": RowConfig(stage="")}))


BAD = {
    "model.vit.heads": (3, r"model\.vit\.heads = 3 must divide model\.vit\.width = 16"),
    "model.vit.image_size": (30, r"image_size = 30 must be a multiple of model\.vit\.patch_size = 8"),
    "model.vit.window": (3, r"model\.vit\.window = 3 must be 0 or divide the 4 patches"),
    "model.vit.feature_layer": (-3, r"feature_layer = -3 must lie between -2 and -1"),
    "model.vit.activation": ("swish", r"activation = 'swish' is unknown; choose one of"),
    "model.llm.kv_heads": (3, r"kv_heads = 3 must divide model\.llm\.heads = 2"),
    "model.llm.head_dim": (7, r"head_dim = 7 must be even"),
    "model.llm.max_positions": (32, r"max_positions = 32 is too small for stages\.base\.method: .* needs 47"),
    "model.llm.rope_theta": (0.0, r"model\.llm\.rope_theta = 0\.0 must be above 0 and finite"),
    "data.held_out": (-1, r"data\.held_out = -1 must be >= 0"),
    "data": (
        DataConfig(name="scenes", vocab_size=64, text_length=32, held_out=2),
        r"data\.held_out = 2 must be 0: only easy_vqa is cut",
    ),
    "stages.base.optim.method": ("sgd", r"optim\.method = 'sgd' is unknown; choose one of 'adamw', 'muon'"),
    "stages.base": (
        StageConfig(batch_size=4, optim=OptimConfig(accumulate=4), loss=LossConfig(contrast=0.1)),
        r"base\.loss\.contrast = 0\.1 needs pictures to tell apart: batch_size / optim\.accumulate is 1",
    ),
    "model.attention": ("flash", r"model\.attention = 'flash' is unknown; choose one of 'auto', 'blocks', 'cudnn'"),
    "model.remat": ("half", r"model\.remat = 'half' is unknown"),
    "model.dtype": ("int8", r"model\.dtype = 'int8' is unknown; choose one of 'float32'"),
    "model.voco_cells": (5, r"model\.voco_cells = 5 must lie between 0 and 4"),
    "model.contrast_dim": (-1, r"model\.contrast_dim = -1 must be >= 0"),
    "data.vocab_size": (65, r"data\.vocab_size = 65 must lie between 5 and 64"),
    "data.targets": (33, r"data\.targets = 33 must lie between 0 and 32"),
    "data.on_error": ("stop", r"data\.on_error = 'stop' is unknown; choose one of 'skip', 'raise'"),
    "data.text_length": (4, r"data\.text_length = 4 must be >= 6"),
    "data.scenes.difficulty": ("mild", r"data\.scenes\.difficulty = 'mild' is unknown; choose one of 'easy', 'medium'"),
    "data.scenes.frame_order": ("random", r"data\.scenes\.frame_order = 'random' is unknown; .* 'shuffled', 'middle'"),
    "data.scenes.size": (16, r"data\.scenes\.size = 16 must lie between 32 and 1024"),
    "data.scenes.frames": (2, r"data\.scenes\.frames = 2 must lie between 3 and 32"),
    "data.scenes.seed": (-1, r"data\.scenes\.seed = -1 must be >= 0"),
    "data.scenes.validation": (0, r"data\.scenes\.validation = 0 must be >= 1"),
    "data.scenes.questions": (0, r"data\.scenes\.questions = 0 must be >= 1"),
    "data.name": ("clips", r"data\.images = 1 is too small for clips of data\.scenes\.frames = 6; give 6"),
    "mesh": (MeshConfig(data=0), r"mesh\.data = 0 must be >= 1, or -1"),
    "platform": ("tpus", r"platform = 'tpus' is unknown"),
    "checkpoint_every": (0, r"checkpoint_every = 0 must be >= 1"),
    "stages.base.steps": (0, r"stages\.base\.steps = 0 must be >= 1"),
    "stages.base.init_from": ("bass", r"stages\.base\.init_from = 'bass' is no stage; choose one of base, voco"),
    "stages.base.train": ((), r"stages\.base\.train is empty"),
    "stages.base.optim.accumulate": (3, r"batch_size = 8 must be a multiple of .*accumulate = 3"),
    "stages.base.optim.learning_rate": (float("nan"), r"learning_rate = nan must be >= 0 and finite"),
    "stages.base.optim.warmup_steps": (2, r"warmup_steps = 2 must lie between 0 and 1"),
    "stages.base.optim.b2": (1.0, r"b2 = 1\.0 must be >= 0 and below 1"),
    "stages.base.frame_order": ("late", r"base\.frame_order = 'late' is unknown; choose one of 'true', 'shuffled'"),
    "rows.upper.frame_order": ("true", r"rows\.upper\.frame_order = 'true' is for .*; with 'easy_vqa' leave it at ''"),
    "stages.base.loss.kl": (1.0, r"stages\.base\.loss\.kl = 1\.0 needs a teacher"),
    "stages.base.loss.ce": (0.0, r"nothing would train"),
    "stages.voco.method.voco": (0, r"stages\.voco\.method\.voco = 0 with the VoCo mask 'voco'"),
    "stages.voco.method.voco_mask": ("vocos", r"voco_mask = 'vocos' is unknown; choose one of"),
    "stages.voco.method.projector": ("mlp", r"projector = 'mlp' is unknown; choose one of"),
    "stages.voco.method.options": (
        {"contextual": 1},
        r"stages\.voco\.method\.options\.contextual is no option of the encoder-site method 'none'\. It has none",
    ),
    "stages.voco.method": (
        MethodConfig(encoder="cls_attention", tokens=4, options={"order": "least"}),
        r"voco\.method\.options\.order = 'least' is unknown; choose one of 'highest', 'lowest'",
    ),
    "rows.upper.method.encoder": ("cls_attention", r"upper\.method: cls_attention: 0 tokens .* must be 1 \.\. 16"),
    "stages.voco.method.encoder": ("visionzap", r"encoder = 'visionzap' is unknown; choose one of"),
    "stages.voco.voco_counts": ((2,), r"voco_counts holds 2; .* between 1 and stages\.voco\.method\.voco = 1"),
    "stages.voco.voco_draw": ("dice", r"voco_draw = 'dice' is unknown; choose one of 'turn', 'random', 'row'"),
    "stages.base.voco_draw": ("row", r"base\.voco_draw = 'row' has nothing to draw from; name numbers of VoCo tokens"),
    "stages.voco.method.positions": ("packed", r"positions = 'packed' is unknown; choose one of 'original', 'compact'"),
    "stages.base.method.positions": ("compact", r"base\.method\.positions = 'compact' needs .*voco_mask = 'voco'"),
    "rows.lower.auto": (AutoConfig(threshold=0.1), r"rows\.lower\.auto has no ladder: name numbers of VoCo tokens in"),
    "rows.lower.auto.ladder": ((1, 2), r"lower\.auto\.ladder = \(1, 2\) must rise from at least 1 to .*voco = 1"),
    "rows.upper.auto.ladder": ((1,), r"rows\.upper\.method\.voco_mask = 'visible' lets them read the picture"),
    "rows.upper.stage": ("bass", r"rows\.upper\.stage = 'bass' is unknown; choose one of 'base', 'voco'"),
    "rows.upper.method": (MethodConfig(projector="avgpool_linear", pool_grid=3, voco_mask="visible"), r"a divisor of"),
    "stages.base.method": (
        MethodConfig(decoder="fastv", decoder_layers=(1,), decoder_keep=(3,)),
        r"data\.questions = 0 must be 1 for stages\.base\.method\.decoder = 'fastv'",
    ),
    "rows.lower.method": (
        MethodConfig(decoder="fastv", decoder_layers=(9,), decoder_keep=(3,)),
        r"rows\.lower\.method\.decoder_layers = \(9,\) must increase strictly and lie between 1 and",
    ),
    "eval.upper": ("best", r"eval\.upper = 'best' is unknown; choose one of 'lower', 'upper'"),
    "eval.order": (("upper", "x"), r"eval\.order entry = 'x' is unknown"),
}


@pytest.mark.parametrize("key", BAD)
def test_what_cannot_work_is_one_sentence(key):
    value, pattern = BAD[key]
    with pytest.raises(ValueError, match=pattern) as error:
        config_check.validate(change(CFG, key, value))
    assert "\n" not in str(error.value)


def test_counts_of_zero_need_a_visible_picture():
    cfg = change(change(CFG, "stages.voco.voco_counts", (0, 1)), "stages.voco.method.voco_mask", "visible")
    config_check.validate(cfg)
    with pytest.raises(ValueError, match="voco_counts holds 0"):
        config_check.validate(change(cfg, "stages.voco.method.voco_mask", "voco"))


def test_ladders_and_compact_positions():
    more = change(change(CFG, "stages.voco.method.voco", 4), "rows.lower.method.voco", 4)
    good = AutoConfig(ladder=(1, 2, 4), threshold=0.1, measure="probability", against="next")
    config_check.validate(change(more, "rows.lower.auto", good))
    for ladder in ((0, 4), (2, 1, 4), (1, 1, 4), (1, 2)):
        with pytest.raises(ValueError, match=r"must rise from at least 1 to rows\.lower\.method\.voco = 4"):
            config_check.validate(change(more, "rows.lower.auto", dataclasses.replace(good, ladder=ladder)))
    for wrong, message in (
        ({"threshold": -0.1}, r"rows\.lower\.auto\.threshold = -0\.1 must be >= 0"),
        ({"measure": "cosine"}, r"rows\.lower\.auto\.measure = 'cosine' is unknown; choose one of 'kl', 'probability'"),
        ({"per": "row"}, r"rows\.lower\.auto\.per = 'row' is unknown; choose one of 'question', 'picture'"),
        ({"against": "first"}, r"rows\.lower\.auto\.against = 'first' is unknown; choose one of 'largest', 'next'"),
    ):
        with pytest.raises(ValueError, match=message):
            config_check.validate(change(more, "rows.lower.auto", dataclasses.replace(good, **wrong)))
    # Seven pictures of 16 patches: 32 + 7 x 15 ids, or 32 alone where pictures take none of them.
    many = change(change(CFG, "data.images", 7), "rows", {})
    with pytest.raises(ValueError, match=r"max_positions = 128 is too small for stages\.base\.method"):
        config_check.validate(many)
    many = dataclasses.replace(many, stages={"voco": dataclasses.replace(CFG.stages["voco"], init_from="a/b")})
    with pytest.raises(ValueError, match=r"max_positions = 128 is too small for stages\.voco\.method: .* needs 137"):
        config_check.validate(many)
    many = change(many, "stages.voco.method.positions", "compact")
    config_check.validate(many)
    with pytest.raises(ValueError, match=r"max_positions = 31 is too small for stages\.voco\.method"):
        config_check.validate(change(many, "model.llm.max_positions", 31))


def test_own_embeddings_limit_the_voco_tokens():
    more = change(CFG, "stages.voco.method.voco", 3)
    config_check.validate(more)  # one shared embedding serves any number
    with pytest.raises(ValueError, match=r"voco = 3 must lie between 0 and model\.voco_embeddings = 2"):
        config_check.validate(change(more, "model.voco_embeddings", 2))


@pytest.mark.parametrize(("tokens", "contextual"), [(0, 0), (99, 2), (4, 5)])
def test_impossible_budgets(tokens, contextual):
    options = {"contextual": contextual}
    method = MethodConfig(encoder="visionzip", tokens=tokens, options=options, voco_mask="visible")
    with pytest.raises(ValueError, match=r"^rows\.upper\.method"):
        config_check.validate(change(CFG, "rows.upper.method", method))
    possible = dataclasses.replace(method, tokens=6, options={"contextual": 2})
    config_check.validate(change(CFG, "rows.upper.method", possible))


def test_stage_order():
    def order(**parents):
        return config_check.stage_order(RunConfig(stages={k: StageConfig(init_from=v) for k, v in parents.items()}))

    assert order(b="c", a="c", c="", d="a") == ["c", "a", "b", "d"]
    assert order(b="", a="path/of/params") == ["a", "b"]
    with pytest.raises(ValueError, match=r"circle: .*a.* -> .*b"):
        order(a="b", b="a")
