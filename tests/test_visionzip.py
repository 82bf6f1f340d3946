"""VisionZip against the official numbers, against a plain loop, and in every corner of its budget."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import padded
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tokzip_jax.compress.visionzip import check_budget, target_places, visionzip

DATA = pathlib.Path(__file__).parent / "data"
# (patches, dominant, contextual): plain with a tail, CLS alone, R == m, everything dominant, nothing merged.
SHAPES = [(16, 5, 5), (16, 1, 4), (16, 9, 8), (16, 17, 0), (16, 6, 0)]
WIDTH, HEAD = 6, 4


def loop(patches, cls, score, keys, dominant, contextual, merge, targets):
    """One picture, read from the paper and the notes on the released code, in float64 and Python loops."""
    prefix = 0 if cls is None else 1
    number = len(patches)
    best_first = sorted(range(number), key=lambda i: (-score[i], i))
    kept = sorted(best_first[: dominant - prefix])
    rest = [i for i in range(number) if i not in kept]
    step = max(1, len(rest) // contextual) if contextual else 1
    if targets == "official":
        chosen = [rest[j * step] for j in range(contextual)]
    else:
        chosen = [rest[int((j + 0.5) * len(rest) / contextual)] for j in range(contextual)]
    norms = [np.linalg.norm(key) for key in keys[prefix:]]
    units = [key / norm if norm else key for key, norm in zip(keys[prefix:], norms, strict=True)]
    groups = [[] for _ in chosen]
    source = [kept.index(i) + prefix if i in kept else -1 for i in range(number)]
    for i in rest:
        if not chosen:
            break
        if i in chosen:
            winner = chosen.index(i)
        else:
            winner = int(np.argmax([units[i] @ units[t] for t in chosen]))
            groups[winner].append(i)
        source[i] = dominant + winner
    tokens = ([] if cls is None else [cls]) + [patches[i] for i in kept]
    for target, members in zip(chosen, groups, strict=True):
        if merge == "paper":
            tokens.append(np.mean([patches[i] for i in [target, *members]], axis=0))
        else:
            tokens.append(patches[target] + (np.mean([patches[i] for i in members], axis=0) if members else 0))
    position = [-1] * prefix + kept + chosen
    size = [0] * prefix + [1] * len(kept) + [1 + len(members) for members in groups]
    return np.array(tokens), np.array(position), np.array(size), np.array(source)


def draw(patches, prefix=1, seed=0, batch=3):
    """Features, CLS, scores, keys of a small batch."""
    rng = np.random.default_rng(seed)
    cls = rng.standard_normal((batch, WIDTH)).astype(np.float32) if prefix else None
    return (
        rng.standard_normal((batch, patches, WIDTH)).astype(np.float32),
        cls,
        rng.random((batch, patches), np.float32),
        rng.standard_normal((batch, prefix + patches, HEAD)).astype(np.float32),
    )


def assert_like_loop(result, inputs, **options):
    patches, cls, score, keys = inputs
    for row in range(len(patches)):
        one = loop(patches[row], None if cls is None else cls[row], score[row], keys[row], **options)
        tokens, position, size, source = one
        np.testing.assert_array_equal(result.position_BM[row], position)
        np.testing.assert_array_equal(result.size_BM[row], size)
        np.testing.assert_array_equal(result.source_BP[row], source)
        np.testing.assert_allclose(result.tokens_BMD[row], tokens, atol=1e-5)


def assert_golden(golden, cls_attention, hidden, metric, dominant, contextual):
    """Kept tokens, targets and groups exactly as the official code's, values to 1e-5."""
    result = visionzip(hidden[:, 1:], hidden[:, 0], cls_attention, metric, dominant=dominant, contextual=contextual)
    np.testing.assert_allclose(result.tokens_BMD, golden["output"], atol=1e-5)
    patches = hidden.shape[1] - 1
    for row, kept in enumerate(golden["all_indices"]):
        np.testing.assert_array_equal(result.position_BM[row, :dominant], np.sort(kept) - 1)
        rest = np.setdiff1d(np.arange(1 + patches), kept) - 1
        targets = rest[golden["target_indices"]]
        np.testing.assert_array_equal(result.position_BM[row, dominant:], targets)
        np.testing.assert_array_equal(np.maximum(result.size_BM[row, dominant:] - 1, 1), golden["counts"][row])
        others = np.setdiff1d(rest, targets)
        np.testing.assert_array_equal(result.source_BP[row, others], dominant + golden["assign_argmax"][row])


@pytest.mark.parametrize(("name", "dominant", "contextual"), [("small", 17, 6), ("grid24", 54, 10)])
def test_official_numbers_of_a_clip_tower(name, dominant, contextual):
    golden = np.load(DATA / f"visionzip_{name}.npz")
    assert_golden(golden, golden["cls_attention_sum"], golden["hidden_lm2"], golden["metric"], dominant, contextual)


@pytest.mark.parametrize(("dominant", "contextual"), [(1, 1), (8, 4), (13, 7), (25, 25), (30, 3), (49, 1)])
def test_official_numbers_of_every_budget(dominant, contextual):
    golden = np.load(DATA / "visionzip_canned.npz")
    prefix = f"d{dominant}_c{contextual}/"
    here = {name.removeprefix(prefix): golden[name] for name in golden.files if name.startswith(prefix)}
    attention = golden["cls_attention"].sum(axis=1)
    assert_golden(here, attention, golden["hidden"], golden["metric"], dominant, contextual)


# Scores on a coarse scale tie often. Keys with entries 0 and +-1 in one or four places have norms 0, 1 and 2, so that
# cosines are exact: duplicates tie exactly, in float32 as in the loop's float64.
SCORES = hnp.arrays(np.float32, (3, 16), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
EXACT_KEYS = st.sampled_from([(0, 0, 0, 0), (1, 0, 0, 0), (0, -1, 0, 0), (1, 1, 1, 1), (1, -1, 1, -1), (-1, -1, 1, 1)])


@pytest.mark.parametrize(
    ("patches", "dominant", "contextual", "merge", "targets"),
    [(*shape, "official", "official") for shape in SHAPES] + [(*shape, "paper", "even") for shape in SHAPES[:3]],
)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_equals_the_loop_with_ties_duplicates_and_zero_keys(patches, dominant, contextual, merge, targets, data):
    features, cls, _, _ = draw(patches)
    score = data.draw(SCORES)
    keys = np.array(data.draw(st.lists(EXACT_KEYS, min_size=3 * 17, max_size=3 * 17)), np.float32).reshape(3, 17, HEAD)
    options = {"dominant": dominant, "contextual": contextual, "merge": merge, "targets": targets}
    result = visionzip(features, cls, score, keys, **options)
    assert np.isfinite(result.tokens_BMD).all()
    assert_like_loop(result, (features, cls, score, keys), **options)


@pytest.mark.parametrize(
    ("dominant", "contextual", "merge", "targets"),
    [(4, 5, "official", "official"), (4, 5, "paper", "even"), (0, 3, "official", "even"), (16, 0, "paper", "official")],
)
def test_encoder_without_cls_token(dominant, contextual, merge, targets):
    inputs = draw(16, prefix=0)
    options = {"dominant": dominant, "contextual": contextual, "merge": merge, "targets": targets}
    result = visionzip(*inputs, **options)
    assert result.tokens_BMD.shape == (3, dominant + contextual, WIDTH)
    assert_like_loop(result, inputs, **options)


@pytest.mark.parametrize(("patches", "dominant", "contextual"), SHAPES)
def test_bookkeeping_agrees_with_itself(patches, dominant, contextual):
    result = visionzip(*draw(patches), dominant=dominant, contextual=contextual)
    slots = dominant + contextual
    assert result.valid_BM.shape == (3, slots) and bool(result.valid_BM.all())
    for row in range(3):
        source, size, position = (np.asarray(x[row]) for x in (result.source_BP, result.size_BM, result.position_BM))
        counted = np.bincount(source[source >= 0], minlength=slots)
        np.testing.assert_array_equal(counted, size)
        np.testing.assert_array_equal(source[position[1:]], np.arange(1, slots))
        if contextual or dominant == patches + 1:
            assert size.sum() == patches
        else:
            assert (source == -1).sum() == patches + 1 - dominant


def test_target_rules():
    np.testing.assert_array_equal(target_places(523, 10, "official"), np.arange(10) * 52)
    np.testing.assert_array_equal(target_places(415, 30, "official")[-1], 377)
    np.testing.assert_array_equal(target_places(11, 4, "official"), [0, 2, 4, 6])
    np.testing.assert_array_equal(target_places(11, 4, "even"), [1, 4, 6, 9])
    for rule in ("official", "even"):
        np.testing.assert_array_equal(target_places(7, 7, rule), np.arange(7))
        assert target_places(7, 0, rule).size == 0


def test_a_picture_does_not_feel_its_neighbours():
    inputs, others = draw(16, seed=0), draw(16, seed=1)
    options = {"dominant": 5, "contextual": 5}
    mixed = visionzip(*(np.concatenate([a[:1], b[1:]]) for a, b in zip(inputs, others, strict=True)), **options)
    whole = visionzip(*inputs, **options)
    for a, b in zip(jax.tree.leaves(mixed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a[0], b[0])


def test_jit_eager_and_vmap_agree():
    inputs = draw(16)
    run = functools.partial(visionzip, dominant=5, contextual=5)
    jitted = run(*inputs)
    with jax.disable_jit():
        eager = run(*map(jnp.asarray, inputs))
    single = jax.vmap(lambda *row: jax.tree.map(lambda x: x[0], run(*(x[None] for x in row))))(*inputs)
    for other in (eager, single):
        for a, b in zip(jax.tree.leaves(jitted), jax.tree.leaves(other), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_bfloat16_chooses_in_float32_and_returns_bfloat16():
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in draw(16)]
    # The CLS feature may come in another dtype; the patches' one decides.
    half = visionzip(inputs[0], inputs[1].astype(jnp.float32), *inputs[2:], dominant=5, contextual=5)
    full = visionzip(*(x.astype(jnp.float32) for x in inputs), dominant=5, contextual=5)
    assert half.tokens_BMD.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half.source_BP, full.source_BP)
    np.testing.assert_array_equal(half.tokens_BMD, full.tokens_BMD.astype(jnp.bfloat16))


@pytest.mark.parametrize("merge", ["official", "paper"])
def test_gradient_is_that_of_the_formula(merge):
    patches, cls, score, keys = draw(16)
    keys[:, 3] = 0.0
    weight = np.random.default_rng(5).standard_normal((3, 10, WIDTH)).astype(np.float32)

    def loss(patches, cls, score, keys):
        result = visionzip(patches, cls, score, keys, dominant=5, contextual=5, merge=merge)
        return jnp.sum(weight * result.tokens_BMD)

    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(patches, cls, score, keys)
    result = visionzip(patches, cls, score, keys, dominant=5, contextual=5, merge=merge)
    expected = np.zeros_like(patches)
    for row in range(3):
        for patch, slot in enumerate(np.asarray(result.source_BP[row])):
            members = int(result.size_BM[row, slot]) - 1
            share = 1.0 / (1 + members) if merge == "paper" else 1.0 / max(members, 1)
            if int(result.position_BM[row, slot]) == patch and merge == "official":
                share = 1.0
            expected[row, patch] = share * weight[row, slot]
    np.testing.assert_allclose(found[0], expected, atol=1e-6)
    np.testing.assert_array_equal(found[1], weight[:, 0])
    assert not np.any(found[2]) and not np.any(found[3])


PADDED = [
    (1, 5, 5, "official", "official"),
    (1, 1, 4, "paper", "even"),
    (0, 4, 3, "official", "even"),
    (1, 7, 0, "official", "official"),
]


@pytest.mark.parametrize("layout", padded.LAYOUTS)
@pytest.mark.parametrize(("prefix", "dominant", "contextual", "merge", "targets"), PADDED)
def test_a_picture_with_padding_is_the_smaller_picture(layout, prefix, dominant, contextual, merge, targets):
    inputs, valid = draw(16, prefix=prefix, seed=7), padded.masks((15, 9, 12), 16, layout)
    inputs[3][:, prefix + 2] = 0.0  # alike to everything
    run = functools.partial(visionzip, dominant=dominant, contextual=contextual, merge=merge, targets=targets)
    padded.assert_as_alone(run, inputs, valid)


@pytest.mark.parametrize("targets", ["official", "even"])
def test_fewer_patches_than_tokens_fill_the_dominant_slots_first(targets):
    """CLS and 5 dominant patches, then targets; with no patch left over nothing is merged."""
    inputs, valid = draw(16, seed=8), padded.masks((8, 5, 2), 16, "scattered")
    run = functools.partial(visionzip, targets=targets)

    def alone(patches):
        dominant = min(6, 1 + patches)
        return functools.partial(run, dominant=dominant, contextual=min(4, 1 + patches - dominant))

    wanted = functools.partial(run, dominant=6, contextual=4)
    padded.assert_as_alone(wanted, inputs, valid, alone)
    nothing = wanted(*inputs, valid_BP=np.zeros((3, 16), bool))
    np.testing.assert_array_equal(nothing.valid_BM, np.arange(10)[None] < np.ones((3, 1)))  # the CLS token
    assert not np.any(nothing.tokens_BMD[:, 1:]) and np.all(nothing.source_BP == -1)


@pytest.mark.parametrize("prefix", [0, 1])
def test_padding_counts_nowhere(prefix):
    run = functools.partial(visionzip, dominant=5, contextual=4)
    padded.assert_padding_counts_nowhere(run, draw(16, prefix=prefix), padded.masks((14, 9, 6), 16, "scattered"))


def test_equal_keys_leave_targets_to_themselves():
    patches, cls, score, _ = draw(16)
    keys, valid = np.ones((3, 17, HEAD), np.float32), padded.masks((14, 11, 16), 16, "scattered")
    padded.assert_as_alone(functools.partial(visionzip, dominant=4, contextual=4), (patches, cls, score, keys), valid)


def test_one_compilation_serves_all_pictures():
    traces = []

    @jax.jit
    def run(*inputs):
        traces.append(1)
        return visionzip(*inputs, dominant=5, contextual=5)

    for seed in range(4):
        run(*draw(16, seed=seed))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("dominant", "contextual", "cls", "message"),
    [
        (0, 4, True, r"0 dominant tokens .* must be 1 \.\. 17"),
        (18, 0, True, r"18 dominant tokens .* must be 1 \.\. 17"),
        (9, 9, True, r"9 contextual tokens .* must be 0 \.\. 8"),
        (9, -1, True, r"-1 contextual tokens .* must be 0 \.\. 8"),
        (17, 0, False, r"17 dominant tokens .* must be 0 \.\. 16"),
        (0, 0, False, r"must be 1 \.\. 16"),
    ],
)
def test_impossible_budget_is_one_sentence(dominant, contextual, cls, message):
    with pytest.raises(ValueError, match=message):
        check_budget(16, dominant, contextual, cls=cls)
    with pytest.raises(ValueError, match=message):
        visionzip(*draw(16, prefix=int(cls)), dominant=dominant, contextual=contextual)


def test_wrong_arguments_are_named():
    patches, cls, score, keys = draw(16)
    run = functools.partial(visionzip, dominant=5, contextual=5)
    with pytest.raises(ValueError, match=r"merge = 'mean' .* official, paper"):
        run(patches, cls, score, keys, merge="mean")
    with pytest.raises(ValueError, match=r"targets = 'odd' .* official, even"):
        run(patches, cls, score, keys, targets="odd")
    with pytest.raises(ValueError, match=r"scores have shape \(3, 15\)"):
        run(patches, cls, score[:, 1:], keys)
    with pytest.raises(ValueError, match="with its CLS row first"):
        run(patches, cls, score, keys[:, 1:])
    with pytest.raises(ValueError, match="without a CLS row"):
        visionzip(patches, None, score, keys, dominant=5, contextual=5)
    with pytest.raises(ValueError, match=r"VisionZip: valid has shape \(3, 17\); it must be \(3, 16\)"):
        run(patches, cls, score, keys, valid_BP=np.ones((3, 17), bool))
