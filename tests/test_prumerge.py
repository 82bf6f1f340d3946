"""PruMerge and PruMerge+ against the official numbers and a plain loop with lists."""

import functools
import operator
import pathlib

import jax
import jax.numpy as jnp
import merging
import numpy as np
import padded
import pytest

from tokzip_jax.compress.prumerge import check_budget, giant_attention, outliers, prumerge, prumerge_plus

DATA = pathlib.Path(__file__).parent / "data"
FEW = 4  # neighbours


def draw(seed=0, batch=3, patches=30):
    """Patches, attention with a long tail, keys with their CLS row."""
    rng = np.random.default_rng(seed)
    attention = rng.exponential(size=(batch, patches)) ** 3
    return (
        rng.normal(size=(batch, patches, 6)).astype(np.float32),
        (0.9 * attention / attention.sum(axis=1, keepdims=True)).astype(np.float32),
        rng.normal(size=(batch, 1 + patches, 5)).astype(np.float32),
    )


INPUTS = draw()


def share_of_outliers(attention):
    """Tukey's rule on whatever is given, in float64."""
    low, high = np.percentile(attention.astype(float), [25, 75])
    return np.mean(attention > high + 1.5 * (high - low))


def centres(attention, slots, share, *, plus, repeats):
    """The centres of one picture in order; `share` is None for a fixed count."""
    patches = len(attention)
    by = sorted(range(patches), key=lambda i: (-attention[i], i))
    if share is None:
        if not plus:
            return by[:slots]
        grid = [int((n + 0.5) * patches / (slots // 2)) for n in range(slots // 2)]
        top = by if repeats == "official" else [i for i in by if i not in grid]
        return top[: slots - slots // 2] + grid
    top = by[: round(share * patches)] if share * patches % 1 < 1e-9 else by[: int(share * patches)]
    if plus:
        stride = max(int(int(1 / share) / 3), 1)
        top = top + [i for i in range(0, patches - 1, stride) if i not in top]
    fitting = sorted(top, key=lambda i: by.index(i))[:slots]
    return [i for i in top if i in fitting]


def loop(row, inputs, tokens, *, plus=False, count="sample", merge="official", repeats="official", neighbours=FEW):
    """(tokens, positions, source) of one picture."""
    x, attention, keys = (part[row].astype(float) for part in inputs)
    keys, patches = keys[1:], len(x)
    slots = tokens - (merge == "official")
    share = {"sample": inputs[1][row], "batch": inputs[1], "fixed": None}[count]
    share = None if share is None else share_of_outliers(share)
    chosen = centres(inputs[1][row], slots, share, plus=plus, repeats=repeats)
    others = [i for i in range(patches) if i not in chosen][len(chosen) - len(set(chosen)) :]
    norms = np.linalg.norm(keys, axis=1)

    def cosine(i, j):
        return keys[i] @ keys[j] / (norms[i] * norms[j])

    out, taken = [], []
    for slot, centre in enumerate(chosen):
        pool = others if merge == "paper" else [j for at, j in enumerate(chosen) if at != slot] + others
        near = sorted(pool, key=lambda j: -cosine(centre, j))[:neighbours]
        total = sum((attention[j] * x[j] for j in near), np.zeros(x.shape[1]))
        if merge == "paper":
            weights = attention[centre] + sum(attention[j] for j in near)
            out.append((attention[centre] * x[centre] + total) / weights)
        else:
            out.append(x[centre] + total)
        taken.append(near)
    source = np.full(patches, -1)
    for j in others:
        takers = [slot for slot in range(len(chosen)) if j in taken[slot]]
        source[j] = max(takers, key=lambda slot: cosine(chosen[slot], j)) if takers else -1
        if not takers and merge == "official":
            source[j] = slots
    for slot, centre in reversed(list(enumerate(chosen))):
        source[centre] = slot
    if merge == "official":
        out.append(sum((attention[j] * x[j] for j in others), np.zeros(x.shape[1])))
    return np.array(out), chosen, source


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 12},
        {"tokens": 4, "merge": "paper"},  # more outliers than slots
        {"tokens": 12, "count": "batch"},
        {"tokens": 9, "count": "fixed"},
        {"tokens": 30, "count": "fixed", "merge": "paper"},  # nobody left to take in
        {"tokens": 31, "plus": True},
        {"tokens": 14, "plus": True, "merge": "paper"},  # the grid overflows
        {"tokens": 31, "plus": True, "count": "batch"},
        {"tokens": 16, "plus": True, "count": "fixed"},
        {"tokens": 16, "plus": True, "count": "fixed", "repeats": "none"},
    ],
    ids=str,
)
def test_equals_the_loop(options):
    options = dict(options)
    plus = options.get("plus", False)
    ours = {name: value for name, value in options.items() if name != "plus"}
    result = (prumerge_plus if plus else prumerge)(*INPUTS, neighbours=FEW, **ours)
    slots = options["tokens"] - (options.get("merge") != "paper")
    sizes = []
    for row in range(3):
        tokens, chosen, source = loop(row, INPUTS, **options)
        number = len(chosen)
        sizes.append(number)
        valid = np.arange(options["tokens"]) < number
        valid[slots:] = True
        np.testing.assert_array_equal(result.valid_BM[row], valid)
        np.testing.assert_array_equal(result.position_BM[row, :number], chosen)
        assert np.all(result.position_BM[row, number:] == -1) and np.all(result.tokens_BMD[row][~valid] == 0)
        np.testing.assert_array_equal(result.source_BP[row], source)
        np.testing.assert_allclose(result.tokens_BMD[row][valid], tokens, atol=1e-5)
    repeated = plus and options.get("count") == "fixed" and options.get("repeats") != "none"
    if repeated:
        counted = [np.bincount(s[s >= 0], minlength=options["tokens"]) for s in np.asarray(result.source_BP)]
        np.testing.assert_array_equal(result.size_BM, counted)
        assert any(len(set(np.asarray(p))) < slots for p in result.position_BM[:, :slots])  # the case is met
    else:
        merging.assert_books(result, 30, dropped=options.get("merge") == "paper")
    if options.get("count") is None and options["tokens"] == 31:
        assert len(set(sizes)) > 1  # pictures differ in number


def official(name):
    golden = np.load(DATA / f"prumerge_{name}.npz")
    attention = jax.jit(giant_attention)(golden["q"], golden["k"])
    np.testing.assert_allclose(attention, golden["cls_attn"], atol=1e-6)
    return golden, (golden["features"], attention, golden["k"])


@pytest.mark.parametrize(
    ("name", "function", "options"),
    [
        ("adaptive", prumerge, {"tokens": 20}),
        ("adaptive", prumerge, {"tokens": 14, "count": "batch"}),
        ("fixed", prumerge, {"tokens": 9, "count": "fixed"}),
        ("plus", prumerge_plus, {"tokens": 160}),
    ],
)
def test_official_numbers(name, function, options):
    golden, inputs = official(name)
    result = function(*inputs, **options)
    number = golden["idx"].shape[1]
    np.testing.assert_array_equal(result.position_BM[:, :number], golden["idx"])
    assert np.all(np.sum(result.valid_BM, axis=1) == number + 1) and bool(result.valid_BM[:, -1].all())
    np.testing.assert_allclose(result.tokens_BMD[:, :number], golden["output"][:, :-1], atol=1e-5)
    np.testing.assert_allclose(result.tokens_BMD[:, -1], golden["output"][:, -1], atol=1e-5)


def test_official_counts():
    golden = np.load(DATA / "prumerge_iqr.npz")
    number, stride = jax.jit(functools.partial(outliers, count="sample"))(golden["cls_attn"])
    np.testing.assert_array_equal(number, golden["k_used"])
    np.testing.assert_array_equal(stride, [max(int(int(576 / max(n, 1)) / 3), 1) for n in golden["outlier_count"]])


def test_without_attention_everything_is_itself():
    patches, attention, keys = INPUTS
    result = prumerge(patches, np.zeros_like(attention), keys, tokens=31, count="fixed", neighbours=FEW)
    np.testing.assert_array_equal(result.tokens_BMD[:, :30], patches)
    assert not np.any(result.tokens_BMD[:, 30]) and np.all(result.size_BM[:, :30] == 1)
    none = prumerge_plus(patches, np.zeros_like(attention), keys, tokens=31, neighbours=FEW)
    # No outlier: the grid of a single one, a stride of a third.
    np.testing.assert_array_equal(none.position_BM[:, :4], [[0, 10, 20, -1]] * 3)


def test_batch_counts_truncate_as_released():
    attention = np.full((2, 30), 0.01, np.float32)
    attention[0, :3] = 0.2
    number, stride = outliers(attention, "batch")
    np.testing.assert_array_equal(number, [1, 1])  # 3 of 60: half an outlier is lost
    np.testing.assert_array_equal(stride, [6, 6])
    number, _ = outliers(attention, "sample")
    np.testing.assert_array_equal(number, [3, 0])


def test_jit_eager_vmap_and_neighbours():
    run = functools.partial(prumerge, tokens=12, neighbours=FEW)
    jitted = run(*INPUTS)
    with jax.disable_jit():
        eager = run(*(jnp.asarray(x) for x in INPUTS))
    single = jax.vmap(lambda *row: jax.tree.map(lambda y: y[0], run(*(x[None] for x in row))))(*INPUTS)
    turned = jax.tree.map(lambda y: y[::-1], run(*(x[::-1] for x in INPUTS)))
    for other in (eager, single, turned):
        for a, b in zip(jax.tree.leaves(jitted), jax.tree.leaves(other)):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_shared_count_couples_pictures():
    """What the option is documented to do, and the default does not."""
    loud = (INPUTS[0], np.concatenate([INPUTS[1][:1], np.full_like(INPUTS[1][1:], 1e-6)]), INPUTS[2])
    for count, same in (("sample", True), ("batch", False)):
        alone, beside = (prumerge(*x, tokens=12, count=count, neighbours=FEW) for x in (INPUTS, loud))
        assert np.array_equal(alone.valid_BM[0], beside.valid_BM[0]) == same


@pytest.mark.parametrize("layout", padded.LAYOUTS)
@pytest.mark.parametrize(
    ("function", "options"),
    [
        (prumerge, {"tokens": 12}),
        (prumerge, {"tokens": 4, "merge": "paper"}),
        (prumerge, {"tokens": 9, "count": "fixed"}),
        (prumerge_plus, {"tokens": 15}),
        (prumerge_plus, {"tokens": 11, "merge": "paper"}),
        (prumerge_plus, {"tokens": 12, "count": "fixed"}),
        (prumerge_plus, {"tokens": 13, "count": "fixed", "merge": "paper", "repeats": "none"}),
    ],
)
def test_a_picture_with_padding_is_the_smaller_picture(layout, function, options):
    valid = padded.masks((27, 14, 21), 30, layout)
    run = functools.partial(function, neighbours=FEW, **options)
    padded.assert_as_alone(run, draw(seed=4), valid, last=int("merge" not in options))


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (prumerge, {"count": "fixed"}),
        (prumerge_plus, {"count": "fixed"}),
        (prumerge_plus, {"count": "fixed", "merge": "paper"}),
        (prumerge_plus, {"count": "fixed", "repeats": "none"}),
        (prumerge_plus, {}),
    ],
)
def test_fewer_patches_than_tokens_have_as_many_centres(function, options):
    valid, further = padded.masks((13, 6, 9), 30, "scattered"), int("merge" not in options)
    run = functools.partial(function, neighbours=FEW, **options)
    wanted = functools.partial(run, tokens=18)
    padded.assert_as_alone(
        wanted, draw(seed=5), valid, lambda patches: functools.partial(run, tokens=patches + further), last=further
    )
    nothing = wanted(*INPUTS, valid_BP=np.zeros((3, 30), bool))
    assert not np.any(nothing.valid_BM) and np.all(nothing.source_BP == -1) and not np.any(nothing.tokens_BMD)


def test_fewer_patches_than_neighbours_are_all_taken_in():
    valid = padded.masks((5, 3, 1), 30, "scattered")
    result = prumerge(*INPUTS, tokens=2, count="fixed", neighbours=10, valid_BP=valid)
    patches, attention, _ = INPUTS
    for row, real in enumerate(valid):
        centre = int(result.position_BM[row, 0])
        assert centre == max(np.flatnonzero(real), key=lambda i: attention[row, i])
        others = real & (np.arange(30) != centre)
        taken = attention[row, others] @ patches[row, others]
        np.testing.assert_allclose(result.tokens_BMD[row], [patches[row, centre] + taken, taken], atol=1e-6)
        np.testing.assert_array_equal(result.source_BP[row], np.where(real, 0, -1))


@pytest.mark.parametrize("function", [prumerge, prumerge_plus])
def test_a_shared_count_is_of_the_valid_patches_of_the_batch(function):
    """Pictures of one size are as those patches alone; of different ones each gets its share of its own patches."""
    inputs, valid = draw(seed=6), padded.masks((21, 21, 21), 30, "scattered")
    run = functools.partial(function, tokens=12, count="batch", neighbours=FEW)
    index = np.array([np.flatnonzero(real) for real in valid])
    small = [np.take_along_axis(x, index[:, :, None] if x.ndim == 3 else index, axis=1) for x in inputs[:2]]
    keys = np.take_along_axis(inputs[2], np.pad(index + 1, ((0, 0), (1, 0)))[:, :, None], axis=1)
    found, alone = run(*inputs, valid_BP=valid), run(*small, keys)
    for row in range(3):
        picture = jax.tree.map(operator.itemgetter(slice(row, row + 1)), alone)
        padded.assert_row(found, row, picture, index[row], last=1)
    attention = np.full((2, 30), 0.01, np.float32)
    attention[0, :3] = 0.2
    # 3 of 30 counted patches: 2 of 20 and 1 of 10 of them; a third of 10 for the grid.
    number, stride = outliers(attention, "batch", np.arange(30)[None] < np.array([[20], [10]]))
    np.testing.assert_array_equal(number, [2, 1])
    np.testing.assert_array_equal(stride, [3, 3])


def test_counts_with_padding_are_the_released_ones():
    """Also where the reciprocal of a reciprocal falls below a whole number: 1 / (1 / 93) is 92."""
    attention = np.zeros((3, 100), np.float32)
    attention[:, 0], attention[2, 1] = 0.2, 0.2
    number, stride = outliers(attention, "sample", padded.masks((93, 94, 92), 100, "end"))
    np.testing.assert_array_equal(number, [1, 1, 2])
    np.testing.assert_array_equal(stride, [30, 31, 15])
    assert int(1 / (1 / 93)) // 3 == 30


@pytest.mark.parametrize(
    ("function", "options"), [(prumerge, {}), (prumerge_plus, {"count": "fixed"}), (prumerge_plus, {"merge": "paper"})]
)
def test_padding_counts_nowhere(function, options):
    run = functools.partial(function, tokens=12, neighbours=FEW, **options)
    padded.assert_padding_counts_nowhere(run, INPUTS, padded.masks((27, 14, 8), 30, "scattered"))


def test_padding_gets_no_attention():
    rng = np.random.default_rng(7)
    queries, keys = rng.normal(size=(2, 13, 5)), rng.normal(size=(2, 13, 5))
    valid = padded.masks((9, 5), 12, "scattered")
    attention = giant_attention(
        queries, np.where(np.pad(valid, ((0, 0), (1, 0)), constant_values=True)[..., None], keys, np.nan), valid
    )
    for row, real in enumerate(valid):
        index = np.flatnonzero(real)
        alone = giant_attention(queries[row : row + 1], keys[row : row + 1][:, np.concatenate([[0], index + 1])])
        np.testing.assert_allclose(attention[row, index], alone[0], atol=1e-6)
        assert not np.any(attention[row, ~real])


@pytest.mark.parametrize("merge", ["official", "paper"])
def test_gradients_are_those_of_the_formula(merge):
    patches, attention, keys = INPUTS
    keys = keys.copy()
    keys[:, 5] = 0.0
    weight = np.random.default_rng(2).normal(size=(3, 12, 6)).astype(np.float32)

    @jax.jit
    def both(patches, attention, keys):
        def total(*x):
            return jnp.sum(weight * prumerge_plus(*x, tokens=12, neighbours=FEW, merge=merge).tokens_BMD)

        return jax.value_and_grad(total, argnums=(0, 1, 2))(patches, attention, keys)

    value, (by_patches, by_attention, by_keys) = both(patches, attention, keys)
    assert np.isfinite(by_attention).all() and np.any(by_attention) and not np.any(by_keys)
    # For chosen centres the tokens are linear in the features, which choose nothing.
    other = np.random.default_rng(3).normal(size=patches.shape).astype(np.float32)
    moved, _ = both(patches + other, attention, keys)
    np.testing.assert_allclose(moved - value, np.sum(by_patches * other), rtol=1e-3, atol=1e-3)
    if merge == "official":  # and linear in attention, as long as it orders the patches as before
        scaled, _ = both(patches, 1.25 * attention, keys)
        np.testing.assert_allclose(scaled - value, 0.25 * np.sum(by_attention * attention), rtol=1e-3, atol=1e-3)


def test_bfloat16_is_chosen_in_float32():
    half = [jnp.asarray(x, jnp.bfloat16) for x in INPUTS]
    low = prumerge_plus(*half, tokens=16, neighbours=FEW)
    high = prumerge_plus(*(x.astype(jnp.float32) for x in half), tokens=16, neighbours=FEW)
    assert low.tokens_BMD.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low.source_BP, high.source_BP)
    np.testing.assert_array_equal(low.tokens_BMD, high.tokens_BMD.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (1, {}, r"PruMerge: 1 tokens \(the further token is one of them\) .* must be 2 \.\. 31"),
        (32, {}, r"32 tokens .* must be 2 \.\. 31"),
        (31, {"merge": "paper"}, r"31 tokens asked of 30 patches; it must be 1 \.\. 30"),
        (8, {"neighbours": 30}, r"neighbours = 30 .* must be 1 \.\. 29"),
        (8, {"neighbours": 0}, r"neighbours = 0 .* must be 1 \.\. 29"),
    ],
)
def test_impossible_budget_is_one_sentence(tokens, options, message):
    options = {"neighbours": FEW, **options}
    with pytest.raises(ValueError, match=message):
        check_budget(30, tokens, **options)
    with pytest.raises(ValueError, match=message):
        prumerge_plus(*INPUTS, tokens=tokens, **options)


def test_wrong_arguments_are_named():
    patches, attention, keys = INPUTS
    run = functools.partial(prumerge, tokens=8, neighbours=FEW)
    with pytest.raises(ValueError, match="merge = 'mean' is unknown; choose one of official, paper"):
        run(patches, attention, keys, merge="mean")
    with pytest.raises(ValueError, match="count = 'all' is unknown; choose one of sample, batch, fixed"):
        run(patches, attention, keys, count="all")
    with pytest.raises(ValueError, match="repeats = 'some' is unknown; choose one of official, none"):
        prumerge_plus(patches, attention, keys, tokens=8, neighbours=FEW, repeats="some")
    with pytest.raises(ValueError, match=r"scores have shape \(3, 29\)"):
        run(patches, attention[:, 1:], keys)
    with pytest.raises(ValueError, match="with their CLS row first"):
        run(patches, attention, keys[:, 1:])
    for function in (prumerge, prumerge_plus):
        with pytest.raises(ValueError, match=r"PruMerge: valid has shape \(3, 29\); it must be \(3, 30\)"):
            function(patches, attention, keys, tokens=8, neighbours=FEW, valid_BP=np.ones((3, 29), bool))
