"""Optimiser: schedule, freezing, decay, clipping and accumulation against arithmetic written out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tokzip_jax import optim
from tokzip_jax.config import OptimConfig
from tokzip_jax.paths import flatten, nest

PARAMS = {
    "vit": {
        "cls": np.ones(4, np.float32),
        "layers": {"0": {"attn": {"q": {"w": np.ones((2, 4, 2, 2), np.float32), "b": np.ones((2, 2, 2), np.float32)}}}},
        "pre_norm": {"scale": np.ones(4, np.float32), "bias": np.ones(4, np.float32)},
    },
    "llm": {
        "layers": {"0": {"norm1": {"scale": np.ones((2, 4), np.float32)}}},
        "head": {"w": np.ones((4, 6), np.float32)},
    },
    "voco": {"table": np.ones((1, 4), np.float32)},
    "contrast": {"image": {"w": np.ones((4, 2), np.float32)}, "scale": np.ones((), np.float32)},
}
PARAMS = jax.tree.map(jnp.asarray, PARAMS)
GRADS = jax.tree.map(lambda p: 0.5 * jnp.ones_like(p), PARAMS)


def run(cfg, patterns, grads=GRADS, steps=10, updates=1):
    schedule = optim.make_schedule(cfg, steps)
    state, params = optim.make_optimizer(cfg, 0.0, PARAMS, patterns).init(PARAMS), PARAMS
    update = jax.jit(lambda rate, *rest: optim.make_optimizer(cfg, rate, PARAMS, patterns).update(*rest))
    for number in range(updates):
        change, state = update(schedule(number), grads, state, params)
        params = optax.apply_updates(params, change)
    return flatten(params), flatten(state), schedule


def test_schedule():
    cfg = OptimConfig(learning_rate=2.0, warmup_steps=4, final_fraction=0.1)
    schedule = optim.make_schedule(cfg, 12)
    np.testing.assert_allclose([schedule(n) for n in range(5)], [0, 0.5, 1, 1.5, 2])
    np.testing.assert_allclose(schedule(8), 0.2 + 0.9, rtol=1e-6)  # half way down
    np.testing.assert_allclose([schedule(12), schedule(50)], [0.2, 0.2], rtol=1e-6)
    assert optim.make_schedule(OptimConfig(learning_rate=2.0), 12)(0) == 2
    only_warmup = optim.make_schedule(OptimConfig(learning_rate=2.0, warmup_steps=3), 3)
    np.testing.assert_allclose([only_warmup(n) for n in range(4)], [0, 2 / 3, 4 / 3, 2], rtol=1e-6)


def test_frozen_parameters_do_not_move_and_have_no_moments():
    params, state, _ = run(OptimConfig(learning_rate=0.1), ("llm/.*", "voco/table"), updates=2)
    before = flatten(PARAMS)
    moved = {path for path in before if not np.array_equal(params[path], before[path])}
    assert moved == {"llm/layers/0/norm1/scale", "llm/head/w", "voco/table"}
    assert not [path for path in state if "/vit/" in path or "/contrast/" in path]
    assert len([path for path in state if path.endswith("llm/head/w")]) == 2  # mean and square


def test_decay_reaches_matrices_only():
    zero = jax.tree.map(jnp.zeros_like, GRADS)
    params, _, _ = run(OptimConfig(learning_rate=0.1, weight_decay=0.5), (".*",), grads=zero)
    shrunk = {path for path, leaf in params.items() if not np.all(leaf == 1)}
    assert shrunk == {"vit/layers/0/attn/q/w", "llm/head/w"}
    np.testing.assert_allclose(params["llm/head/w"], 1 - 0.1 * 0.5, rtol=1e-6)


def test_one_step_is_adamw_on_the_clipped_gradient():
    # Adam's step hides the gradient's length; its first moment shows it.
    cfg = OptimConfig(learning_rate=0.1, clip_norm=1.0, b1=0.5)
    _, state, _ = run(cfg, ("llm/head/w",))
    norm = 0.5 * np.sqrt(PARAMS["llm"]["head"]["w"].size)  # frozen gradients do not count
    (mean,) = (leaf for path, leaf in state.items() if "/mu/" in path)
    np.testing.assert_allclose(mean, 0.5 * 0.5 / norm, rtol=1e-6)
    _, state, _ = run(OptimConfig(clip_norm=0.0, b1=0.5), ("llm/head/w",))
    (mean,) = (leaf for path, leaf in state.items() if "/mu/" in path)
    np.testing.assert_allclose(mean, 0.25, rtol=1e-6)


def test_the_trained_part_alone_is_updated_like_the_whole_tree():
    tx = optim.make_optimizer(OptimConfig(), 0.1, PARAMS, ("llm/.*",))
    whole, _, _ = run(OptimConfig(learning_rate=0.1), ("llm/.*",))
    part, grads = {"llm": PARAMS["llm"]}, {"llm": GRADS["llm"]}
    change, _ = jax.jit(tx.update)(grads, tx.init(part), part)
    moved = flatten(optax.apply_updates(part, change))
    assert moved.keys() == {"llm/layers/0/norm1/scale", "llm/head/w"}
    for path, leaf in moved.items():
        np.testing.assert_allclose(leaf, whole[path], rtol=1e-6)


def test_a_pattern_without_a_parameter_is_refused():
    with pytest.raises(ValueError, match=r"train pattern 'llm/hed/\.\*' matches no parameter.*contrast, llm, vit"):
        optim.make_optimizer(OptimConfig(), 1, PARAMS, ("voco/.*", "llm/hed/.*"))


def test_muon_turns_matrices_and_leaves_the_rest_to_adamw():
    """The update has the singular vectors of the gradient, and singular values near 0.2 * sqrt(longer side)."""
    shapes = {
        "vit/layers/0/attn/q/w": ((2, 6, 2, 2), (6, 4)),  # two layers; width 6, two heads of 2
        "vit/layers/0/attn/o/w": ((2, 2, 2, 6), (4, 6)),
        "llm/layers/0/mlp/down/w": ((2, 8, 5), (8, 5)),
        "projector/mlp2x_gelu/fc1/w": ((4, 6), (4, 6)),
        "llm/layers/0/norm1/scale": ((2, 6), None),
        "llm/embed/table": ((7, 6), None),
        "llm/head/w": ((6, 7), None),
        "voco/table": ((2, 6), None),
    }
    rng = np.random.default_rng(0)
    tree, grads = (
        nest({path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, (shape, _) in shapes.items()})
        for _ in range(2)
    )
    rate, decay = 0.01, 0.1
    cfg = OptimConfig(method="muon", weight_decay=decay, clip_norm=0.0)
    changes = []
    for chosen in (cfg, dataclasses.replace(cfg, method="adamw")):
        tx = optim.make_optimizer(chosen, rate, tree, (".*",))
        changes.append(flatten(jax.jit(tx.update)(grads, tx.init(tree), tree)[0]))
    turned, adamw = changes
    for path, (_, matrix) in shapes.items():
        if matrix is None:
            np.testing.assert_allclose(turned[path], adamw[path], rtol=1e-6, err_msg=path)
            continue
        gradient, before = (np.asarray(flatten(part)[path]).reshape(-1, *matrix) for part in (grads, tree))
        update = -np.asarray(turned[path]).reshape(-1, *matrix) / rate - decay * before
        left, _, right = np.linalg.svd(gradient, full_matrices=False)
        inside = left.swapaxes(1, 2) @ update @ right.swapaxes(1, 2) / (0.2 * np.sqrt(max(matrix)))
        diagonal = np.diagonal(inside, axis1=1, axis2=2)
        assert diagonal.min() > 0.6, path  # Newton and Schulz's five steps end within 0.3 of 1 and go no further
        assert diagonal.max() < 1.3, path
        assert np.abs(inside - diagonal[:, None] * np.eye(min(matrix))).max() < 1e-3, path


def test_an_uncovered_path_is_refused():
    with pytest.raises(ValueError, match="no weight-decay rule covers 'llm/gate'"):
        optim.make_optimizer(OptimConfig(), 1, {"llm": {"gate": jnp.ones(2)}}, (".*",))
