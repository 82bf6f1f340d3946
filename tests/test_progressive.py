"""The schedule under which compression grows, and a step whose teacher has a budget of its own."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model as tiny
from small_run import ROOT, load_file

from tokzip_jax import config_check, distill, method_check, progressive, recipe, sharding, step, vlm
from tokzip_jax.config import (
    LossConfig,
    MeshConfig,
    MethodConfig,
    OptimConfig,
    ProgressiveConfig,
    RowConfig,
    StageConfig,
)
from tokzip_jax.masks import TABLES
from tokzip_jax.progressive import Budget
from tokzip_jax.types import IMAGE_ID, VOCO_ID
from tokzip_jax.workdir import Workdir

SELF = LossConfig(ce=0.5, kl=0.5, teacher="self")
VOCO = StageConfig(
    steps=10,
    method=MethodConfig(voco=8, voco_mask="voco"),
    loss=SELF,
    progressive=ProgressiveConfig(site="voco"),
)
ENCODER = StageConfig(
    steps=10,
    method=MethodConfig(encoder="visionzip", tokens=8, options={"contextual": 2}),
    loss=SELF,
    progressive=ProgressiveConfig(site="encoder", budgets=(16, 12, 8, 4)),
)
# Two cuts: of 16 tokens a half, then a quarter.
DECODER = StageConfig(
    steps=10,
    method=MethodConfig(decoder="pyramiddrop", decoder_layers=(1, 2), decoder_keep=(8, 4)),
    loss=SELF,
    progressive=ProgressiveConfig(site="decoder", budgets=(16, 12, 8, 4)),
)
PROJECTOR = StageConfig(
    steps=10,
    method=MethodConfig(projector="avgpool_linear", pool_grid=4),
    loss=SELF,
    progressive=ProgressiveConfig(site="projector", budgets=(16, 4, 1)),
)
KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("progress", "lot", "student", "teacher"),
    [  # EPIC's code: from 0.1 to 0.26 .. 0.74, behind it a teacher with a lead of 0.1 to 0.3, full after 2/5
        (0.0, 0.0, 0.1, 0.0),
        (0.0, 1.0, 0.1, 0.0),
        (0.2, 1.0, 0.228, 0.028),
        (0.4, 0.5, 0.26, 0.0),
        (0.5, 1.0, 0.42, 0.12),
        (1.0, 0.0, 0.26, 0.0),
        (1.0, 0.5, 0.5, 0.2),
        (1.0, 1.0, 0.74, 0.44),
    ],
)
def test_ratios_by_hand(progress, lot, student, teacher):
    found = progressive.ratios(ProgressiveConfig(site="voco"), progress, lot)
    assert found == pytest.approx((student, teacher))


def test_ratios_of_the_paper():
    paper = ProgressiveConfig(
        site="voco", low=0.05, final_low=0.05, high=0.05, final_high=0.9, lead=0.05, final_lead=0.3, lead_by=1.0
    )
    assert progressive.ratios(paper, 0.0, 1.0) == pytest.approx((0.05, 0.0))
    assert progressive.ratios(paper, 0.5, 1.0) == pytest.approx((0.475, 0.3))
    assert progressive.ratios(paper, 1.0, 1.0) == pytest.approx((0.9, 0.6))


@pytest.mark.parametrize("stage", [VOCO, ENCODER, DECODER, PROJECTOR], ids=lambda stage: stage.progressive.site)
def test_budgets_shrink_and_the_teacher_reads_more(stage):
    long = dataclasses.replace(stage, steps=400)
    found = [progressive.budget(long, tiny.MODEL, number, 3, "a") for number in range(400)]
    student, teacher = np.array(found).T
    assert np.all(teacher >= student) and np.any(teacher > student) and student.min() >= 1
    assert student[:80].mean() > student[160:240].mean() > student[-80:].mean()
    if budgets := set(stage.progressive.budgets):
        assert set(student) | set(teacher) <= budgets and {16, 4} <= set(student)
    else:
        assert teacher.max() == 8 and len(set(student)) >= 5
    assert found == [progressive.budget(long, tiny.MODEL, number, 3, "a") for number in range(400)]
    assert found != [progressive.budget(long, tiny.MODEL, number, 3, "b") for number in range(400)]
    # A teacher whom nobody asks makes no programs.
    alone = dataclasses.replace(long, loss=LossConfig())
    assert progressive.budget(alone, tiny.MODEL, 399, 3, "a") == Budget(student[399], student[399])


def test_methods_of_a_budget():
    """Merged tokens keep their quarter of the budget; VoCo counts change no method."""
    student, teacher = progressive.methods(ENCODER, tiny.MODEL, Budget(4, 12))
    assert [(m.tokens, m.options) for m in (student, teacher)] == [(4, {"contextual": 1}), (12, {"contextual": 3})]
    assert progressive.methods(VOCO, tiny.MODEL, Budget(2, 5)) == (VOCO.method, VOCO.method)


def test_cuts_of_a_budget_keep_their_shape():
    """16 -> 8 -> 4 at powers of the stage's own shares: 1 keeps all, the stage's own budget its own schedule."""
    kept = {tokens: progressive.at_budget(DECODER, tiny.MODEL, tokens).decoder_keep for tokens in (16, 12, 9, 4, 1)}
    assert kept == {16: (16, 16), 12: (14, 12), 9: (12, 9), 4: (8, 4), 1: (4, 1)}
    one_cut = dataclasses.replace(DECODER.method, decoder="fastv", decoder_layers=(1,), decoder_keep=(2,))
    one_cut = dataclasses.replace(DECODER, method=one_cut)
    assert [progressive.at_budget(one_cut, tiny.MODEL, n).decoder_keep for n in range(1, 17)] == [
        (n,) for n in range(1, 17)
    ]


@pytest.mark.parametrize(
    ("name", "given", "settings"),
    [
        (
            "avgpool_linear",
            {"pool_grid": 4, "pool_rows": 1},
            {1: {"pool_grid": 1}, 2: {"pool_grid": 2, "pool_rows": 1}, 4: {"pool_rows": 1}, 8: {"pool_rows": 2}},
        ),
        ("ldpv2", {"pool_grid": 2}, {1: {"pool_grid": 1}, 16: {"pool_grid": 4}}),
        ("mlp_pool", {"factor": 3, "pool": "bilinear"}, {4: {}, 16: {"factor": 1}}),
        ("mlp_pool", {"factor": 1, "pool": "bilinear"}, {16: {"factor": 1}, 4: {"factor": 2}, 1: {"factor": 4}}),
        ("nested_pool", {}, {16: {"level": 0}, 4: {"level": 1}, 1: {"level": 2}}),
        ("mqt", {}, {5: {"queries": 5}, 1: {"queries": 1}}),
        ("llamavid", {"content_grid": 4}, {17: {"content_grid": 4}, 2: {"content_grid": 1}}),
    ],
)
def test_projectors_of_a_budget(name, given, settings):
    method = MethodConfig(projector=name, **given)
    model = dataclasses.replace(tiny.MODEL, projector=dataclasses.replace(tiny.MODEL.projector, queries=9, heads=2))
    stage = dataclasses.replace(PROJECTOR, method=method)
    for tokens, changes in settings.items():
        made = progressive.at_budget(stage, model, tokens)
        rows = {"pool_rows": 0} if tokens == 1 else {}
        assert made == dataclasses.replace(method, **{**rows, **changes})
        assert vlm.visual_slots(model, made) == progressive.tokens_of("projector", made, model) == tokens


def test_a_frozen_teacher_reads_no_voco_tokens(tmp_path):
    """It was never trained to: the whole picture, whatever the student's number; over patches it has its budget."""
    frozen = dataclasses.replace(VOCO, init_from="a", loss=LossConfig(kl=1.0))
    found, own = (
        [progressive.budget(stage, tiny.MODEL, number, 3, "a") for number in range(10)] for stage in (frozen, VOCO)
    )
    assert [line.student for line in found] == [line.student for line in own]
    assert {line.teacher for line in found} == {0}
    assert progressive.methods(frozen, tiny.MODEL, found[0]) == (VOCO.method, None)
    ready = recipe.prepare(run_of(VOCO), "a", sharding.make_mesh(MeshConfig()), Workdir(tmp_path))
    ready = dataclasses.replace(ready, cfg=frozen, budget=lambda number: found[number])
    for number in (0, 9):
        program, given = ready.at(number)
        assert program is ready.program(VOCO.method, None) and given["counts"] == found[number].student
    pooled = dataclasses.replace(PROJECTOR, init_from="a", loss=LossConfig(kl=1.0))
    found = progressive.budget(pooled, tiny.MODEL, 9, 3, "a")
    assert found == Budget(progressive.budget(PROJECTOR, tiny.MODEL, 9, 3, "a").student, 0)
    for stage in (ENCODER, DECODER):
        over_patches = dataclasses.replace(stage, init_from="a", loss=LossConfig(kl=1.0))
        own = progressive.budget(stage, tiny.MODEL, 9, 3, "a")
        assert progressive.budget(over_patches, tiny.MODEL, 9, 3, "a") == own and own.teacher > own.student


@pytest.mark.parametrize(
    ("student", "own", "reads"),
    [  # the teacher's projector -> what it reads
        (PROJECTOR.method, "mlp2x_gelu", 16),
        (dataclasses.replace(PROJECTOR.method, pool_grid=1), "avgpool_linear", 16),
        (MethodConfig(projector="pool_mlp", factor=4), "mlp2x_gelu", 16),
        (MethodConfig(projector="nested_pool", level=2), "mlp2x_gelu", 16),
    ],
)
def test_a_frozen_teacher_behind_a_projector_reads_the_most(monkeypatch, student, own, reads):
    stage = dataclasses.replace(PROJECTOR, init_from="b", method=student, loss=LossConfig(kl=1.0))
    monkeypatch.setattr(distill.vlm, "forward", lambda cfg, weights, batch, method, **given: method)
    found = distill._second_pass(tiny.MODEL, stage, {"projector": {own: {}}}, {}, None, 0, KEY)
    assert (found.projector, vlm.visual_slots(tiny.MODEL, found)) == (own, reads)
    # One that has a budget of its own, at another site, keeps it, and the way in which it pools.
    cut = MethodConfig(projector="pool_mlp", factor=2, decoder="fastv", decoder_layers=(1,), decoder_keep=(2,))
    assert distill._second_pass(tiny.MODEL, DECODER, {"projector": {"mlp2x_gelu": {}}}, {}, cut, 0, KEY) == cut


def test_frozen_teachers_are_cut_behind_their_own_projector():
    one_cut = MethodConfig(decoder="fastv", decoder_layers=(1,), decoder_keep=(8,))
    cfg = run_of(dataclasses.replace(DECODER, method=one_cut))
    base = StageConfig(steps=1, batch_size=8)
    data = dataclasses.replace(cfg.data, questions=1)
    frozen = dataclasses.replace(cfg.stages["a"], init_from="b", loss=LossConfig(kl=1.0))
    cfg = dataclasses.replace(cfg, data=data, stages={"b": base, "a": frozen})
    config_check.validate(cfg)
    method = dataclasses.replace(one_cut, projector="avgpool_linear", pool_grid=4)
    other = dataclasses.replace(cfg, stages={"b": base, "a": dataclasses.replace(frozen, method=method)})
    with pytest.raises(ValueError, match=r"frozen teacher's projector is 'mlp2x_gelu': they must be the same"):
        config_check.validate(other)


def test_a_row_may_read_what_the_schedule_trained():
    """Of mqt's queries the schedule's most, whatever the stage's own number is."""
    cfg = run_of(StageConfig())
    model = dataclasses.replace(cfg.model, projector=dataclasses.replace(cfg.model.projector, queries=16, heads=2))
    stage = dataclasses.replace(PROJECTOR, method=MethodConfig(projector="mqt", queries=4))
    stage = dataclasses.replace(stage, progressive=ProgressiveConfig(site="projector", budgets=(9, 4)))
    cfg = dataclasses.replace(cfg, model=model, stages={"a": stage})
    row = RowConfig(stage="a", method=MethodConfig(projector="mqt", queries=9))
    method_check.same_projector("r", row, cfg)
    with pytest.raises(ValueError, match=r"r\.method\.queries = 10 .* it must lie between 1 and 9"):
        more = dataclasses.replace(row, method=MethodConfig(projector="mqt", queries=10))
        method_check.same_projector("r", more, cfg)


def change(stage, **fields):
    return dataclasses.replace(stage, progressive=dataclasses.replace(stage.progressive, **fields))


BAD = {
    "stages.a.progressive.site = 'tower' is unknown": change(VOCO, site="tower"),
    "scales method.decoder_keep = (16, 16), of which the last cut must leave fewer than the 16": dataclasses.replace(
        DECODER, method=dataclasses.replace(DECODER.method, decoder_keep=(16, 16))
    ),
    "stages.a.progressive.budgets = (17, 4) must lie between 1 and 16 tokens": change(DECODER, budgets=(17, 4)),
    "needs method.decoder (it is 'none')": dataclasses.replace(DECODER, method=MethodConfig()),
    "the projector 'avgpool_linear' cannot make 5 tokens, but 1, 2, 4, 8, 16": change(PROJECTOR, budgets=(16, 5)),
    "the projector 'mlp2x_gelu' has no option that sets how many tokens": dataclasses.replace(
        PROJECTOR, method=MethodConfig()
    ),
    "chooses what method.draw_budget = True draws": dataclasses.replace(
        PROJECTOR, method=MethodConfig(projector="nested_pool", draw_budget=True)
    ),
    "stages.a.progressive has no site": change(VOCO, site="", low=0.2),
    "stages.a.progressive.final_high = 1.5 must lie between 0 and 1": change(VOCO, final_high=1.5),
    "stages.a.progressive.low = 0.2 must be at most stages.a.progressive.high = 0.1": change(VOCO, low=0.2),
    "takes no budgets (they are (4,))": change(VOCO, budgets=(4,)),
    "needs method.voco >= 2 (it is 1)": dataclasses.replace(VOCO, method=MethodConfig(voco=1, voco_mask="voco")),
    "uses fewer than the 8 tokens that method.voco_start = 'pooled' starts from a part": dataclasses.replace(
        VOCO, method=dataclasses.replace(VOCO.method, voco_start="pooled")
    ),
    "chooses what voco_counts = (1, 2) does": dataclasses.replace(VOCO, voco_counts=(1, 2)),
    "the numbers of tokens in stages.a.progressive.budgets (they are ())": change(ENCODER, budgets=()),
    "needs method.encoder (it is 'none')": dataclasses.replace(ENCODER, method=MethodConfig()),
    "stages.a.progressive.budgets: visionzip: 18 tokens": change(ENCODER, budgets=(18, 4)),
    "stages.a.progressive.budgets: 0 tokens must be at least 1": change(ENCODER, budgets=(0,)),
}


@pytest.mark.parametrize("words", BAD)
def test_schedules_that_cannot_be(words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        progressive.check("stages.a", BAD[words], tiny.MODEL)
    assert "\n" not in str(error.value)
    for good in (VOCO, ENCODER, DECODER, PROJECTOR, StageConfig()):
        progressive.check("stages.a", good, tiny.MODEL)


def run_of(stage):
    cfg = load_file(ROOT / "configs" / "tiny.py").run_config()
    return dataclasses.replace(cfg, stages={"a": dataclasses.replace(stage, batch_size=8)}, rows={})


def test_a_schedule_goes_with_no_loss_on_the_teacher():
    cfg = dataclasses.replace(run_of(VOCO), model=dataclasses.replace(run_of(VOCO).model, voco_embeddings=8))
    config_check.validate(cfg)
    joint = dataclasses.replace(VOCO, loss=dataclasses.replace(SELF, teacher_ce=1.0))
    with pytest.raises(ValueError, match=r"stages\.a\.loss\.teacher_ce = 1\.0 reads all visual tokens of the step"):
        config_check.validate(dataclasses.replace(cfg, stages={"a": joint}))
    # The largest budget has to fit, whatever the stage's own one is.
    wide = dataclasses.replace(ENCODER, progressive=dataclasses.replace(ENCODER.progressive, budgets=(17, 4)))
    with pytest.raises(ValueError, match=r"max_positions = 79 is too small for stages\.a\.method.* needs 80"):
        short = dataclasses.replace(cfg.model, llm=dataclasses.replace(cfg.model.llm, max_positions=79))
        config_check.validate(dataclasses.replace(run_of(wide), model=short))


def test_a_step_takes_the_program_of_its_budget(tmp_path):
    """Every VoCo count is one program; of an encoder's budgets each pair is one, the same one when it comes again."""
    mesh = sharding.make_mesh(MeshConfig())
    voco = recipe.prepare(run_of(VOCO), "a", mesh, Workdir(tmp_path))
    programs, given = zip(*(voco.at(number) for number in range(10)))
    counts = [told["counts"] for told in given]
    assert len(set(map(id, programs))) == 1 and len({tuple(count) for count in counts}) > 3
    assert counts[9].dtype == np.int32 and tuple(counts[9]) == voco.budget(9)
    encoder = recipe.prepare(run_of(ENCODER), "a", mesh, Workdir(tmp_path))
    pairs = {}
    for number in range(40):
        program, given = encoder.at(number % 10)
        assert pairs.setdefault(encoder.budget(number % 10), program) is program
        assert tuple(given["counts"]) == (0, 0)
    assert 1 < len(pairs) == len(set(map(id, pairs.values()))) <= 10
    plain = dataclasses.replace(VOCO, progressive=ProgressiveConfig(), voco_counts=(1, 4))
    ready = recipe.prepare(run_of(plain), "a", mesh, Workdir(tmp_path))
    assert ready.at(3)[0] is ready.run_step and ready.at(3)[1]["counts"] == 4


def test_a_step_of_cuts_on_eight_devices_is_that_on_one(tmp_path):
    """Student and teacher cut by their own schedules, in the recipe's own program; what it logs are the two budgets."""
    method = MethodConfig(decoder="fastv", decoder_layers=(1,), decoder_keep=(4,))
    cfg = run_of(dataclasses.replace(DECODER, method=method, train=("llm/.*",), optim=OptimConfig(clip_norm=0.0)))
    data = dataclasses.replace(cfg.data, vocab_size=32, questions=1, targets=4)
    model = dataclasses.replace(tiny.MODEL, llm=dataclasses.replace(tiny.LLM, layers=2))
    cfg = dataclasses.replace(cfg, model=model, data=data)
    config_check.validate(cfg)
    batch = {**tiny.batch([ROW, ROW[:1] + ROW[2:]] * 4, 10), "captions": np.zeros((8, 4), np.int32)}
    found = []
    for mesh in (sharding.make_mesh(MeshConfig(data=4, model=2)), sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        with jax.set_mesh(mesh):
            ready = recipe.prepare(cfg, "a", mesh, Workdir(tmp_path))
            number = next(n for n in range(10) if ready.budget(n).student < ready.budget(n).teacher < 16)
            program, given = ready.at(number)
            placed = sharding.shard_batch(mesh, batch)
            state, metrics = program(ready.begin(), placed, None, sharding.place(mesh, given))
            assert (metrics["student_tokens"], metrics["teacher_tokens"]) == ready.budget(number)
            found.append([float(metrics[name]) for name in ("loss", "kl", "grad_norm")])
            del state
    assert min(found[0]) > 1e-6
    np.testing.assert_allclose(*found, rtol=1e-4)


ROW = [[1, IMAGE_ID, VOCO_ID], [5, 6], ([7, 8, 9], {"supervised": True})]
BATCH = tiny.batch([ROW, ROW[:1] + ROW[2:]], 10)


def lines(method, table, count):
    """Log probabilities [6, V] at the supervised tokens."""
    logits, slots = tiny.forward(tiny.params(), BATCH, TABLES[table], np.int32(count), method=method)
    row, at = np.nonzero(slots.supervised)
    logits = np.asarray(logits, np.float64)[row, np.asarray(slots.previous)[row, at]]
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_each_reads_its_own_budget():
    """KL of two passes of one model: with 2 and 5 VoCo tokens, and with 4 and 12 visual ones."""

    def found(stage, reads, counts):
        method, reads = reads
        return jax.jit(
            lambda params, counts: step.loss_terms(
                tiny.MODEL,
                dataclasses.replace(stage, method=method),
                params,
                BATCH,
                teacher=None,
                reads=reads,
                voco_count=counts[0],
                teacher_count=counts[1],
                key=KEY,
                max_targets=4,
            )
        )(tiny.params(), jnp.asarray(counts, jnp.int32))

    def expected(student, teacher):
        return np.sum(np.exp(teacher) * (teacher - student))

    terms = found(VOCO, progressive.methods(VOCO, tiny.MODEL, Budget(2, 5)), (2, 5))
    assert "teacher_ce" not in terms and float(terms["count"]) == 6
    tiny.close(terms["kl"], expected(lines(VOCO.method, "voco", 2), lines(VOCO.method, "voco", 5)), atol=1e-4)
    for stage in (ENCODER, DECODER):
        few, more = progressive.methods(stage, tiny.MODEL, Budget(4, 12))
        terms = found(stage, (few, more), (0, 0))
        tiny.close(terms["kl"], expected(lines(few, "visible", 0), lines(more, "visible", 0)), atol=1e-4)
