"""Projectors inside the model: the question that some read, training, meshes, shared weights, and what is refused."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_model as tiny

from tokzip_jax import config as c
from tokzip_jax import config_check, layout, method_check, sharding, step, vlm, voco
from tokzip_jax.compress import everything
from tokzip_jax.optim import DECAY
from tokzip_jax.paths import first_match, flatten, map_with_path
from tokzip_jax.projectors import PROJECTORS, Context, weights_name
from tokzip_jax.types import IMAGE_ID

SIZES = c.ProjectorConfig(queries=4, width=8, layers=2, heads=2, mlp_dim=16, text_length=3)
CFG = dataclasses.replace(tiny.MODEL, projector=SIZES, contrast_dim=0)
OPTION = {
    "avgpool_linear": {"pool_grid": 2},
    "pool_linear": {"factor": 2},
    "pool_mlp": {"factor": 2},
    "mlp_pool": {"factor": 3, "pool": "bilinear"},
    "nested_pool": {"draw_budget": True},
    "ldpv2": {"pool_grid": 3},
    "llamavid": {"content_grid": 2},
    "mqt": {"draw_budget": True},
}
METHODS = {name: c.MethodConfig(projector=name, **OPTION.get(name, {})) for name in PROJECTORS}
FAMILIES = ("nested_pool", "ldp", "instructblip", "mqt")  # one with a draw, convolutions, words, and queries of its own
KEY = jax.random.key(0)


def shapes(name, cfg=CFG):
    return jax.eval_shape(functools.partial(vlm.init, cfg, name), KEY)


@functools.cache
def params(name):
    """Parameters drawn by NumPy; as NumPy arrays, since who asks first may be under jit."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        size = rng.uniform(0.5, 1.5, leaf.shape) if path.endswith("scale") else rng.normal(size=leaf.shape) / 4
        return size.astype(leaf.dtype)

    return map_with_path(draw, shapes(name))


def asked(question, answer, images=1):
    return [
        [1, *[IMAGE_ID] * images],
        (question, {"thread": 1}),
        (answer, {"thread": 1, "supervised": True}),
    ]


ROWS = [asked([5, 6, 7, 8], [9, 2]), asked([4], [5, 6, 2]), asked([10, 11], [2])]


def naive_question(batch, row, length):
    """Id by id."""
    found, picture = [], False
    for at, token in enumerate(batch["ids"][row]):
        if batch["sample"][row, at] == 0 or batch["thread"][row, at] > 1:
            continue
        if batch["supervised"][row, at]:
            break
        picture |= token == IMAGE_ID
        if picture and token > 0:
            found.append(int(token))
    return found[-length:]


@pytest.mark.parametrize("left", [False, True])
def test_the_question_of_a_row(left):
    """Words of the first question behind the picture; no prefix, no answer, no second question, no padding."""
    second = [([20, 21], {"thread": 2}), ([22, 2], {"thread": 2, "supervised": True})]
    talk = [([1, 30, IMAGE_ID, 12], {}), ([13, 2], {"supervised": True}), ([14], {}), ([15], {"supervised": True})]
    prompt, text_only = [[1, IMAGE_ID, -201], ([16, 17], {"thread": 1})], [[1, 18, 19], ([2], {"supervised": True})]
    batch = tiny.batch([*ROWS, ROWS[0] + second, talk, prompt, text_only], 12, left=left)
    read = jax.jit(layout.question, static_argnums=1)
    expected = [[5, 6, 7, 8], [4], [10, 11], [5, 6, 7, 8], [12], [16, 17], []]
    for length in (3, 20):
        ids, valid = (np.asarray(part) for part in read(batch, length))
        assert ids.shape == valid.shape == (7, min(length, 12))
        for row, words in enumerate(expected):
            assert naive_question(batch, row, length) == words[-length:]
            assert ids[row][valid[row]].tolist() == words[-length:]
            assert not ids[row][~valid[row]].any() and valid[row].sum() == valid[row][: len(words)].sum()


@pytest.mark.parametrize("name", ["instructblip", "llamavid"])
def test_the_question_and_not_the_answer_reaches_the_picture(name):
    """Two pictures a row: each is read with the row's own question."""
    rows = [asked([5, 6, 7], [9, 2], 2), asked([4], [5, 6, 2], 2), asked([10, 11], [2], 2)]
    other_question = [asked([5, 6, 8], [9, 2], 2), *rows[1:]]
    other_answer = [asked([5, 6, 7], [10, 3], 2), *rows[1:]]
    method = METHODS[name]

    @jax.jit
    def run(params, batch):
        return vlm.embed(CFG, params, batch, method, voco_count=0, key=KEY)[2].tokens_BMD

    first, question, answer = (
        np.asarray(run(params(name), tiny.batch(r, 10, count=2))) for r in (rows, other_question, other_answer)
    )
    assert first.shape[0] == 6
    np.testing.assert_array_equal(first, answer)
    np.testing.assert_array_equal(first[2:], question[2:])
    differs = np.abs(first - question).max(axis=(1, 2))
    assert differs[0] > 1e-4 and differs[1] > 1e-4


def test_a_projector_that_asks_for_text_says_so():
    images = tiny.images(1)
    with pytest.raises(ValueError, match=r"'llamavid' reads the question: give vlm\.encode text=\(ids, valid\)"):
        vlm.encode(CFG, params("llamavid"), images, METHODS["llamavid"], KEY)
    method = dataclasses.replace(METHODS["instructblip"], voco=1, voco_mask="voco")
    with pytest.raises(ValueError, match="'instructblip' reads the question, so that a picture's cache would serve"):
        voco.build(CFG, {}, tiny.batch(ROWS, 8), method)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_trains_the_projector(name):
    """The loss is finite and every parameter moves (but for what a softmax cannot see)."""
    stage = c.StageConfig(method=METHODS[name], train=("projector/.*",), loss=c.LossConfig(chunk=8))
    tx = optax.sgd(1.0)
    trained, _ = step.partition(params(name), stage.train)
    state = step.TrainState(step=jnp.int32(0), params=params(name), opt_state=tx.init(trained))

    @jax.jit
    def run(state, batch):
        return step.train_step(CFG, stage, tx, state, batch, voco_count=jnp.int32(0), key=KEY, max_targets=3)

    new, metrics = run(state, tiny.batch(ROWS, 8))
    assert all(np.isfinite(float(value)) for value in metrics.values()) and float(metrics["tokens"]) == 6
    before, after = flatten(params(name)), flatten(new.params)
    assert all(np.isfinite(leaf).all() for leaf in after.values())
    moved = {path for path in before if np.any(np.asarray(before[path]) != np.asarray(after[path]))}
    mine = {path for path in before if path.startswith("projector/")}
    # What is added to all keys changes no softmax, and nobody reads what the last layer makes of the words.
    idle = {path for path in mine if path.endswith(("k/b", "key/b")) or path == "projector/mqt/norm2/bias"}
    idle |= {path for path in mine if re.search(r"layers/0/1/(text_mlp|norm4)/", path)}
    assert moved - idle == mine - idle


def test_the_teacher_of_a_drawn_budget_reads_everything(monkeypatch):
    method = dataclasses.replace(METHODS["nested_pool"], level=1, voco=1)
    stage = c.StageConfig(method=method, loss=c.LossConfig(kl=1.0, chunk=8))
    seen, forward = [], vlm.forward

    def listen(cfg, params, batch, method, **options):
        seen.append(method)
        return forward(cfg, params, batch, method, **options)

    monkeypatch.setattr(vlm, "forward", listen)
    options = {"voco_count": jnp.int32(0), "key": KEY, "max_targets": 3}
    run = functools.partial(step.loss_terms, CFG, stage, **options)
    jax.eval_shape(lambda p, b: run(p, b, teacher=p), shapes("nested_pool"), tiny.batch(ROWS, 8))
    assert seen == [method, c.MethodConfig(projector="mlp2x_gelu")]


def test_pooling_runs_on_the_weights_of_the_plain_projector():
    """One set of parameters, three budgets; the pooled tokens are pools of the plain ones."""
    plain = params("mlp2x_gelu")
    assert jax.tree.structure(shapes("nested_pool")) == jax.tree.structure(shapes("mlp2x_gelu"))
    methods = [c.MethodConfig(), *(c.MethodConfig(projector="nested_pool", level=level) for level in (1, 2))]

    @jax.jit
    def run(images):
        return [vlm.encode(CFG, plain, images, method, KEY)[0].tokens_BMD for method in methods]

    whole, four, one = (np.asarray(tokens) for tokens in run(tiny.images(2)))
    blocks = whole.reshape(2, 2, 2, 2, 2, -1).mean(axis=(2, 4)).reshape(2, 4, -1)
    np.testing.assert_allclose(four, blocks, atol=1e-5)
    np.testing.assert_allclose(one[:, 0], whole.mean(axis=1), atol=1e-5)


@pytest.mark.parametrize("name", PROJECTORS)
def test_every_parameter_has_a_rule(name):
    """Of sharding, for the right number of dimensions, and of weight decay."""
    mesh = sharding.make_mesh(c.MeshConfig(data=4, model=2))
    for path, leaf in flatten(shapes(name)).items():
        spec = sharding.spec_for(mesh, path, leaf.shape)
        if path.startswith("projector/") and path.endswith(("/w", "table")):
            assert any(spec), path
        decays = first_match(DECAY, path, name="weight-decay")
        assert decays == path.endswith(("/w", "kernel")) or not path.startswith("projector/")
    assert list(shapes(name)["projector"]) == [weights_name(name)]


def test_a_mesh_changes_nothing():
    """LLaMA-VID, which has a parameter of nearly every kind: values and gradients on 4 x 2 devices."""
    entry, rng = PROJECTORS["llamavid"], np.random.default_rng(0)
    inputs = [rng.standard_normal((8, *shape)).astype(np.float32) for shape in ((16, 16), (16,))]
    inputs.append(rng.integers(1, 32, (8, 3)).astype(np.int32))

    @jax.jit
    def run(params, patches, cls, ids):
        def loss(params):
            context = Context(cls_BD=cls, key=KEY, question=(ids, ids > 4))
            method = METHODS["llamavid"]
            tokens = entry.apply(CFG, method, params["projector"]["llamavid"], everything(patches), context).tokens_BMD
            return jnp.mean(jnp.sin(tokens)), tokens

        return jax.grad(loss, has_aux=True)(params)

    mine = {"projector": params("llamavid")["projector"]}
    expected = jax.device_get(run(mine, *inputs))
    mesh = sharding.make_mesh(c.MeshConfig(data=4, model=2))
    placed = jax.device_put(mine, sharding.param_shardings(mesh, mine))
    with jax.set_mesh(mesh):
        batch = sharding.shard_batch(mesh, dict(zip("abc", inputs)))
        found = jax.device_get(run(placed, *batch.values()))
    for (path, a), b in zip(flatten(expected).items(), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5, rtol=1e-4, err_msg=path)


RUN = c.RunConfig(model=CFG, data=c.DataConfig(text_length=16, vocab_size=32, questions=1))
BAD = {
    "no factor": ({"projector": "mlp_pool"}, r"x\.factor = 0 must lie between 1 and the 4 patches of a side"),
    "mode": ({"projector": "pool_mlp", "factor": 2, "pool": "mean"}, r"x\.pool = 'mean' is unknown; choose one of 'av"),
    "order": ({"projector": "pixel_unshuffle", "unshuffle_order": "v3"}, r"x\.unshuffle_order = 'v3' is unknown"),
    "rows": (
        {"projector": "avgpool_linear", "pool_grid": 2, "pool_rows": 3},
        r"x\.pool_rows = 3 must be a divisor of the 4 patches of a side",
    ),
    "square": ({"projector": "ldpv2", "pool_grid": 2, "pool_rows": 1}, r"x\.pool_rows = 1 is nothing that .* 'ldpv2'"),
    "level": ({"projector": "nested_pool", "level": 3}, r"level = 3 must lie between 0 and 2, for grids of side 4, 2"),
    "ldpv2": ({"projector": "ldpv2", "pool_grid": 12}, r"x\.pool_grid = 12 must lie between 1 and the 4 patches"),
    "queries": ({"projector": "mqt", "queries": 5}, r"x\.queries = 5 must lie between 1 and .*\.queries = 4"),
    "keys": ({"projector": "mqt", "mqt_keys": "both"}, r"x\.mqt_keys = 'both' is unknown; choose one of 'official'"),
    "content": ({"projector": "llamavid", "content_grid": 3}, r"x\.content_grid = 3 must be a divisor of the 4"),
    "unread": ({"level": 1}, r"x\.level = 1 is nothing that the projector 'mlp2x_gelu' reads; leave it at 0"),
    "drawn": ({"projector": "mlp_pool", "factor": 2, "draw_budget": True}, r"x\.draw_budget = True is nothing that"),
    "grid": (
        {"projector": "ldp", "encoder": "uniform", "tokens": 4},
        r"x\.encoder = 'uniform' breaks the grid that ldp works on; it must be 'none'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_one_sentence(case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message) as error:
        method_check.check("x", c.MethodConfig(**options), CFG)
    assert "\n" not in str(error.value)


SIZED = {
    "pixel_unshuffle": ({"unshuffle": 3}, r"model\.projector\.unshuffle = 3 must be a divisor of the 4 patches"),
    "mqt": ({"queries": 5}, r"model\.projector\.queries = 5 must be a square number for mqt"),
    "qformer": ({"cross_every": 3}, r"cross_every = 3 must divide model\.projector\.layers = 2"),
    "instructblip": ({"heads": 3}, r"model\.projector\.heads = 3 must divide model\.projector\.width = 8"),
    "llamavid": ({"text_length": 0}, r"model\.projector\.text_length = 0 must be >= 1"),
}


@pytest.mark.parametrize("name", SIZED)
def test_sizes_that_no_projector_can_have(name):
    sizes, message = SIZED[name]
    method_check.check("x", METHODS[name], CFG)
    wrong = dataclasses.replace(CFG, projector=dataclasses.replace(SIZES, **sizes))
    with pytest.raises(ValueError, match=message):
        method_check.check("x", METHODS[name], wrong)
    method_check.check("x", c.MethodConfig(), wrong)  # nobody else minds


def whole_run(stage, row, questions=1):
    data = dataclasses.replace(RUN.data, questions=questions)
    rows = {"r": c.RowConfig(method=row)}
    evaluation = c.EvalConfig(upper="r", lower="r")
    return dataclasses.replace(RUN, data=data, stages={"base": c.StageConfig(method=stage)}, rows=rows, eval=evaluation)


def test_rows_read_what_their_stage_trains():
    nested = c.MethodConfig(projector="nested_pool")
    drawn = dataclasses.replace(nested, draw_budget=True)
    config_check.validate(whole_run(drawn, dataclasses.replace(nested, level=2)))
    config_check.validate(whole_run(c.MethodConfig(), METHODS["mlp_pool"]))  # the same weights
    with pytest.raises(ValueError, match=r"rows\.r\.method\.draw_budget = True is for training"):
        config_check.validate(whole_run(drawn, drawn))
    with pytest.raises(ValueError, match=r"rows\.r\.method\.projector = 'pool_linear' is not what stage 'base' trains"):
        config_check.validate(whole_run(drawn, METHODS["pool_linear"]))
    few, all_of_them = c.MethodConfig(projector="mqt", queries=2), c.MethodConfig(projector="mqt")
    config_check.validate(whole_run(all_of_them, few))
    with pytest.raises(ValueError, match=r"queries = 0 \(0 = all\) is more than stage 'base' trains; .* 1 and 2"):
        config_check.validate(whole_run(few, all_of_them))


def test_one_question_a_row_for_those_that_read_it():
    method = METHODS["llamavid"]
    config_check.validate(whole_run(method, method))
    for questions in (0, 2):
        with pytest.raises(ValueError, match=rf"a picture has one set of .* data\.questions = {questions} must be 1"):
            config_check.validate(whole_run(method, method, questions))
