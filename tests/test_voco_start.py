"""VoCo tokens that start from pooled parts of the picture: the parts, the means, where they go, and both stages."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model as tiny

from tokzip_jax import config_check, elastic, llm, method_check, optim, vlm, voco, voco_start
from tokzip_jax.config import AutoConfig, DataConfig, EvalConfig, MethodConfig, RowConfig, RunConfig, StageConfig
from tokzip_jax.evals import runner
from tokzip_jax.types import IMAGE_ID, VOCO, VOCO_ID, VisualTokens

CFG = tiny.MODEL
METHOD = MethodConfig(voco=4, voco_mask="voco", voco_start="pooled")
ROWS = [
    [[tiny.BOS, IMAGE_ID, VOCO_ID, 9, IMAGE_ID, VOCO_ID], [5, 6]],
    [[IMAGE_ID, VOCO_ID, IMAGE_ID, VOCO_ID], [7, 8, 9]],
]


def test_parts():
    assert [voco_start.parts(count) for count in (1, 2, 4, 6, 7, 8, 9, 12)] == [
        *((1, 1), (1, 2), (2, 2), (2, 3), (1, 7), (2, 4), (3, 3), (3, 4))
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 8])
def test_means_of_parts(count):
    """6 x 6 patches, of which some are not there, stand for several, or have no place."""
    rng = np.random.default_rng(count)
    position = np.stack([np.append(rng.permutation(36)[:20], -1) for _ in range(3)]).astype(np.int32)
    valid = rng.random(position.shape) < 0.7
    size = rng.integers(1, 4, position.shape).astype(np.int32)
    tokens = rng.normal(size=(*position.shape, 5)).astype(np.float32)
    visual = VisualTokens(tokens, valid, position, size, np.zeros((3, 36), np.int32))
    found = np.asarray(voco_start.pooled(visual, count, grid=6))
    rows, columns = voco_start.parts(count)
    for picture, part in np.ndindex(3, count):
        inside = []
        for token, place in enumerate(position[picture]):
            y, x = divmod(int(place), 6)
            if valid[picture, token] and place >= 0 and (y * rows // 6, x * columns // 6) == divmod(part, columns):
                inside += [tokens[picture, token]] * size[picture, token]
        np.testing.assert_allclose(found[picture, part], np.mean(inside, axis=0) if inside else 0.0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_cells_have_matrices_of_their_own(count):
    """3 x 3 cells of 2 x 2 patches, of which two parts share some; without weights nothing is added to the means."""
    rng = np.random.default_rng(count)
    position = np.stack([np.append(rng.permutation(36)[:20], -1) for _ in range(3)]).astype(np.int32)
    valid, size = rng.random(position.shape) < 0.8, rng.integers(1, 4, position.shape).astype(np.int32)
    tokens = rng.normal(size=(*position.shape, 5)).astype(np.float32)
    visual = VisualTokens(tokens, valid, position, size, np.zeros((3, 36), np.int32))
    weights = rng.normal(size=(9, 5, 5)).astype(np.float32)
    found = np.asarray(voco_start.from_cells(visual, count, weights, grid=6))
    expected = np.asarray(voco_start.pooled(visual, count, grid=6)).copy()
    np.testing.assert_array_equal(voco_start.from_cells(visual, count, 0 * weights, grid=6), expected)
    rows, columns = voco_start.parts(count)
    for picture, part, cell in np.ndindex(3, count, 9):
        inside = []
        for token, place in enumerate(position[picture]):
            y, x = divmod(int(place), 6)
            here = (y * rows // 6, x * columns // 6) == divmod(part, columns) and (y // 2, x // 2) == divmod(cell, 3)
            if valid[picture, token] and place >= 0 and here:
                inside += [tokens[picture, token]] * size[picture, token]
        if inside:
            expected[picture, part] += np.mean(inside, axis=0) @ weights[cell]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_cells_begin_as_pooling_and_learn():
    """Fresh matrices are zero: the model answers as with pooled starts, and its gradient moves every cell's matrix."""
    cfg = dataclasses.replace(CFG, voco_cells=2)
    fresh = vlm.init(cfg, "mlp2x_gelu", jax.random.key(0))["voco"]["cells"]
    params = {**tiny.params(), "voco": {**tiny.params()["voco"], "cells": fresh}}
    batch = tiny.batch(ROWS, 9, count=2)

    def total(cells, method):
        hidden = vlm.forward(cfg, {**params, "voco": {**params["voco"], "cells": cells}}, batch, method).hidden_BTD
        return jnp.sum(llm.logits(cfg, params["llm"], hidden) ** 2)

    run = jax.jit(jax.value_and_grad(total), static_argnums=1)
    method = dataclasses.replace(METHOD, voco=1, voco_start="cells")
    value, grads = run(fresh, method)
    np.testing.assert_allclose(value, run(fresh, dataclasses.replace(method, voco_start="pooled"))[0], rtol=1e-6)
    size = np.abs(np.asarray(grads["w"])).sum(axis=(1, 2))
    assert size.shape == (4,) and np.all(np.isfinite(size)) and np.all(size > 0)
    assert optim.matrix_axes("voco/cells/w") == optim.Axes(1, 2)  # a matrix a cell, not one of all cells


@pytest.mark.parametrize("start", ["pooled", "cells"])
def test_flops_are_xlas(start):
    """Within five per cent: XLA also counts what is done element by element, little at this width."""
    shapes = {"tokens_BMD": (1, 64, 512), **dict.fromkeys(("valid_BM", "position_BM", "size_BM", "source_BP"), (1, 64))}
    types = {"tokens_BMD": jnp.float32, "valid_BM": bool}
    visual = VisualTokens(**{n: jax.ShapeDtypeStruct(s, types.get(n, jnp.int32)) for n, s in shapes.items()})
    weights = jax.ShapeDtypeStruct((4, 512, 512), jnp.float32)

    def run(visual, weights):
        means = {"pooled": voco_start.pooled, "cells": functools.partial(voco_start.from_cells, weights_CDD=weights)}
        return means[start](visual, 4, grid=8)

    counted = jax.jit(run).lower(visual, weights).cost_analysis()["flops"]
    assert voco_start.flops(start, 4, 64, 512, 2) == pytest.approx(counted, rel=0.05)
    assert voco_start.flops("embedding", 4, 64, 512, 2) == 0


def test_cells_need_matrices():
    with pytest.raises(ValueError, match=r"x\.voco_start = 'cells' needs a matrix a cell: set model\.voco_cells"):
        method_check.check("x", dataclasses.replace(METHOD, voco_start="cells"), CFG)
    method_check.check("x", dataclasses.replace(METHOD, voco_start="cells"), dataclasses.replace(CFG, voco_cells=2))


@pytest.mark.parametrize("start", ["pooled", "cells"])
def test_parts_of_a_picture_are_for_all_tokens_at_once(start):
    """With a number that changes the first token would start from a corner; with none, or all, nothing is wrong."""
    method = dataclasses.replace(METHOD, voco=4, voco_start=start)
    stage = StageConfig(method=method, voco_counts=(4, 2))
    with pytest.raises(ValueError, match=r"a\.voco_counts = \(4, 2\) uses fewer than the 4 VoCo tokens that a\.method"):
        elastic.check_draw("a", stage)
    for counts in ((), (4,), (0, 4)):
        elastic.check_draw("a", dataclasses.replace(stage, voco_counts=counts))
    elastic.check_draw("a", dataclasses.replace(stage, method=dataclasses.replace(method, voco_start="embedding")))
    with pytest.raises(ValueError, match=r"r\.auto\.ladder = \(1, 4\) reads fewer than the 4 VoCo tokens"):
        elastic.check_auto("r", AutoConfig(ladder=(1, 4)), method)


def embedded(method):
    batch = tiny.batch(ROWS, 9, count=2)
    embed = jax.jit(lambda p, b: vlm.embed(CFG, p, b, method, voco_count=3, key=jax.random.key(0))[:3])
    return jax.device_get(embed(tiny.params(), batch))


def test_every_picture_starts_its_own_tokens():
    """Four parts of two pictures, three tokens in use; everything else is what it was."""
    x, slots, visual = embedded(METHOD)
    plain, *_ = embedded(dataclasses.replace(METHOD, voco_start="embedding"))
    kind, segment = slots.stream.kind, slots.stream.segment
    assert (kind == VOCO).sum() == 2 * 2 * 3
    np.testing.assert_array_equal(x[kind != VOCO], plain[kind != VOCO])
    tokens = visual.tokens_BMD.reshape(2, 2, 2, 2, 2, 2, 16)  # row, picture, upper/lower, patch row, left/right, column
    means = tokens.mean(axis=(3, 5)).reshape(2, 2, 4, 16)
    for row, slot in zip(*np.nonzero(kind == VOCO)):
        start = means[row, segment[row, slot] - 1, slots.voco[row, slot]]
        np.testing.assert_allclose(x[row, slot] - plain[row, slot], start, atol=1e-5)


def test_both_stages_are_one_masked_pass():
    picture, question = [tiny.BOS, IMAGE_ID, VOCO_ID], [5, 6, 7]
    batch = tiny.batch([[picture], [picture]], 3)
    cache = jax.jit(lambda p, b: voco.build(CFG, p, b, METHOD))(tiny.params(), batch)
    ids = np.array([question, question], np.int32)
    found = jax.jit(lambda p, c: voco.ask(CFG, p, c, ids, max_new=1).logits_BV)(tiny.params(), cache)
    whole = tiny.batch([[picture, question]] * 2, 6)

    def loss(params, method):
        hidden = vlm.forward(CFG, params, whole, method).hidden_BTD
        return llm.logits(CFG, params["llm"], hidden)[:, -1]

    tiny.close(found, jax.jit(loss, static_argnums=1)(tiny.params(), METHOD), atol=1e-4)
    # The projector learns through the start as well: what the first layer's values of VoCo tokens say of the picture.
    first = dataclasses.replace(CFG, llm=dataclasses.replace(CFG.llm, layers=1))
    one = jax.tree.map(lambda leaf: leaf[:1], tiny.params()["llm"]["layers"])
    params = {**tiny.params(), "llm": {**tiny.params()["llm"], "layers": one}}

    def total(params, method):
        hidden = vlm.forward(first, params, whole, method).hidden_BTD
        return jnp.sum(llm.logits(first, params["llm"], hidden)[:, -1] ** 2)

    grads = {
        start: jax.jit(jax.grad(total), static_argnums=1)(params, dataclasses.replace(METHOD, voco_start=start))
        for start in ("embedding", "pooled")
    }
    norms = {start: sum(float(jnp.abs(g).sum()) for g in jax.tree.leaves(grads[start]["projector"])) for start in grads}
    assert norms["embedding"] == 0.0 and np.isfinite(norms["pooled"]) and norms["pooled"] > 0


def test_scoring_keeps_the_parts_of_the_row(monkeypatch):
    """Rows share a program with the most VoCo slots of all stages, but not where a token's part depends on them."""
    stages = {"base": StageConfig(method=MethodConfig(voco=8)), "voco": StageConfig(method=METHOD)}
    made = []
    monkeypatch.setattr(runner, "_scorer", lambda cfg, method, *_: made.append(method) or (lambda *_: np.zeros((1, 1))))
    batch = {"example": np.array([-1]), "question": np.array([[-1]]), "supervised": np.zeros((1, 3), bool)}
    monkeypatch.setattr(runner.Runner, "batches", lambda *_: [batch])
    cfg = RunConfig(model=CFG, stages=stages)
    run = runner.Runner(cfg, None, jax.make_mesh((1, 1), ("data", "model")), None, [])
    for method in (METHOD, dataclasses.replace(METHOD, voco_start="embedding")):
        with pytest.raises(ValueError, match="no question was scored"):
            run.score({"voco": {}}, method, 0)
    assert [(method.voco_start, method.voco) for method in made] == [("pooled", 4), ("embedding", 8)]


@pytest.mark.parametrize(
    "changes", [{"voco": 0, "voco_mask": "visible"}, {"projector": "qformer"}, {"packing": "spatial"}]
)
def test_starts_that_cannot_be(changes):
    with pytest.raises(ValueError, match=r"x\.voco_start = 'pooled' needs VoCo tokens and visual tokens with a place"):
        method_check.check("x", dataclasses.replace(METHOD, **changes), CFG)


def test_a_row_starts_as_its_stage_does():
    model = dataclasses.replace(CFG, llm=dataclasses.replace(CFG.llm, vocab_size=512, max_positions=256))
    cfg = RunConfig(
        model=model,
        data=DataConfig(),
        stages={"base": StageConfig(), "voco": StageConfig(init_from="base", method=METHOD)},
        rows={"base": RowConfig()},
        eval=EvalConfig(upper="base", lower="base"),
    )

    def validate(**changes):
        row = RowConfig(stage="voco", method=dataclasses.replace(METHOD, **changes))
        config_check.validate(dataclasses.replace(cfg, rows={**cfg.rows, "voco": row}))

    validate()
    validate(voco=0, voco_mask="visible", voco_start="embedding")  # the uncompressed model behind that training
    for changes in ({"voco": 2}, {"voco_start": "embedding"}):
        with pytest.raises(ValueError, match=r"rows\.voco\.method has voco = . .* what tokens start from, and from"):
            validate(**changes)
