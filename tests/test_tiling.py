"""Tiles of one picture in the language model: stitched against a loop, one by one, and what a method leaves of each."""

import dataclasses
import functools

import jax
import numpy as np
import official
import pytest
import tiny_model as tiny

from tokzip_jax import config_check, flops, optim, sharding, tiling, vlm
from tokzip_jax.config import DataConfig, EvalConfig, MethodConfig, RowConfig, RunConfig, StageConfig
from tokzip_jax.data import anyres
from tokzip_jax.paths import first_match
from tokzip_jax.types import IMAGE_ID, PAD, TEXT, VISION, VOCO, VOCO_ID, VisualTokens

SIDE, MOST, WIDTH = 3, 4, 5  # patches along a tile's side, tiles, and the width of a token
TILES = np.array([(2, 2, 10, 4), (1, 2, 3, 9), (3, 1, 9, 3), (0, 0, 0, 0)], np.int32)


def drawn(rows, kept, seed=0):
    """Tokens at `kept` of the places of every tile, and one without a place behind them; some are not valid."""
    rng = np.random.default_rng(seed)
    pictures = rows * (1 + MOST)
    place = np.stack([np.append(rng.permutation(SIDE**2)[:kept], -1) for _ in range(pictures)]).astype(np.int32)
    valid = rng.random(place.shape) < 0.8
    source = np.full((pictures, SIDE**2), -1, np.int32)
    for picture, places in enumerate(place):
        source[picture, places[:-1]] = np.where(valid[picture, :-1], np.arange(kept), -1)
    tokens = rng.normal(size=(*place.shape, WIDTH)).astype(np.float32)
    return VisualTokens(tokens, valid, place, np.where(place < 0, 0, 2), source)


def looped(visual, tiles, newline, row, merged=0):
    """The tokens of one row, by going through the canvas; without a newline nothing is left out."""
    tokens, valid, place = (
        np.asarray(leaf).reshape(-1, 1 + MOST, *np.shape(leaf)[1:])[row]
        for leaf in (visual.tokens_BMD, visual.valid_BM, visual.position_BM)
    )
    columns, rows, *size = tiles[row].tolist()
    top, bottom, left, right = 0, rows * SIDE, 0, columns * SIDE
    if newline is not None:
        top, bottom, left, right = anyres.real_box(size, (columns, rows), SIDE)
    kept = np.arange(tokens.shape[1]) < tokens.shape[1] - merged
    out = list(tokens[0][valid[0]])
    for y in range(top, bottom):
        for x in range(left, right):
            tile = 1 + y // SIDE * columns + x // SIDE
            out += list(tokens[tile][valid[tile] & kept & (place[tile] == y % SIDE * SIDE + x % SIDE)])
        out += [] if newline is None else [newline]
    for behind in (place < 0, (place >= 0) & ~kept):
        for tile in range(1, 1 + columns * rows):
            out += list(tokens[tile][valid[tile] & behind[tile]])
    return np.array(out)


@functools.partial(jax.jit, static_argnames="merged")
def stitch(visual, tiles, newline, merged=0):
    return tiling.stitch(visual, tiles, newline, side=SIDE, merged=merged)


def test_nothing_is_left_out_without_newlines():
    """VisionZip's order: overview, kept patches of the whole canvas, what has no place, merged tokens."""
    visual = drawn(4, 6)
    visual = jax.tree.map(lambda leaf: np.roll(leaf, 1, axis=1) if leaf.shape[1] == 7 else leaf, visual)  # CLS first
    found = jax.device_get(stitch(visual, TILES, None, merged=2))
    assert found.valid_BM.shape == (4, tiling.slots("spatial", 1 + MOST, 7, SIDE)) == (4, 5 * 7)
    for row in range(3):
        expected = looped(visual, TILES, None, row, merged=2)
        assert found.valid_BM[row].sum() == len(expected)
        np.testing.assert_array_equal(found.tokens_BMD[row, : len(expected)], expected)


def test_stitched_tokens_by_a_loop():
    visual, newline = drawn(4, 6), np.full(WIDTH, 9.0, np.float32)
    found = jax.device_get(stitch(visual, TILES, newline))
    assert found.valid_BM.shape == (4, tiling.slots("spatial_unpad", 1 + MOST, 7, SIDE)) == (4, 5 * 7 + 4 * 3)
    for row in range(3):
        expected = looped(visual, TILES, newline, row)
        count = found.valid_BM[row].sum()
        assert found.valid_BM[row, :count].all()
        np.testing.assert_array_equal(found.tokens_BMD[row, :count], expected)
        # Every patch's slot holds the token that the patch went to.
        for patch, slot in enumerate(found.source_BP[row]):
            picture = row * (1 + MOST) + patch // SIDE**2
            old = visual.source_BP[picture, patch % SIDE**2]
            if slot >= 0:
                np.testing.assert_array_equal(found.tokens_BMD[row, slot], visual.tokens_BMD[picture, old])
                assert found.position_BM[row, slot] == patch % SIDE**2 and found.size_BM[row, slot] == 2
        newlines = found.valid_BM[row] & (found.size_BM[row] == 0)
        assert (found.position_BM[row][newlines] == -1).all()
        assert (found.source_BP[row] >= 0).sum() == found.valid_BM[row].sum() - newlines.sum()


ONEVISION = official.read("onevision_anyres")
shrink = jax.jit(tiling.shrink, static_argnames="side")


def whole(tokens, pictures, side):
    """Every token of [B, I, side^2, D], and as many pictures as asked for."""
    tokens = np.pad(tokens, ((0, 0), (0, pictures - tokens.shape[1]), (0, 0), (0, 0)))
    tokens = tokens.reshape(-1, side**2, tokens.shape[-1]).astype(np.float32)
    place = np.tile(np.arange(side**2, dtype=np.int32), (len(tokens), 1))
    return VisualTokens(tokens, np.ones(place.shape, bool), place, np.ones_like(place), place)


@pytest.mark.parametrize("case", ["a0", "a1", "a2"])
def test_anyres_max_9_of_the_official_code(case):
    features, grid, size = (ONEVISION[f"{case}/{name}"] for name in ("features", "grid", "image_size"))
    tiles = np.array([(*grid[::-1], *size[::-1])], np.int32)
    found = jax.device_get(shrink(whole(features[None], 37, 4), tiles, ONEVISION[f"{case}/newline"], side=4))
    np.testing.assert_allclose(found.tokens_BMD[found.valid_BM], ONEVISION[f"{case}/out"], rtol=1e-5, atol=1e-5)
    model = dataclasses.replace(NEXT, vit=dataclasses.replace(NEXT.vit, image_size=16, patch_size=4))
    counted = flops.stitched_tokens(model, MethodConfig(packing="anyres_max_9"), tiles[0].tolist())
    assert counted == len(ONEVISION[f"{case}/out"])


def resized(canvas, height, width):
    """Bilinear with half-pixel centres, one token at a time."""
    out = np.zeros((height, width, canvas.shape[-1]))
    for y, x in np.ndindex(height, width):
        at = [max((i + 0.5) * old / new - 0.5, 0) for i, old, new in zip((y, x), canvas.shape, (height, width))]
        (top, left), (down, across) = map(int, at), (at[0] % 1, at[1] % 1)
        for row, share in ((top, 1 - down), (min(top + 1, canvas.shape[0] - 1), down)):
            for column, part in ((left, 1 - across), (min(left + 1, canvas.shape[1] - 1), across)):
                out[y, x] += share * part * canvas[row, column]
    return out


SHRUNK = [(4, 5, 80, 100), (6, 6, 36, 36), (5, 5, 50, 50), (3, 3, 9, 9), (6, 2, 90, 20), (1, 1, 7, 7), (0, 0, 0, 0)]


def test_shrunk_canvas_by_a_loop():
    """Grids below and above the limit, padding on either side, and a row without a picture."""
    side, pictures = 3, 37
    tokens = np.random.default_rng(0).normal(size=(len(SHRUNK), pictures, side**2, 2)).astype(np.float32)
    found = shrink(whole(tokens, pictures, side), np.array(SHRUNK, np.int32), np.full(2, 9.0, np.float32), side=side)
    found = jax.device_get(found)
    length = tiling.slots("anyres_max_9", pictures, side**2, side)
    assert found.valid_BM.shape == (len(SHRUNK), length) == (7, 9 + 98 + 108)
    limit = 0
    for row, (columns, rows, *size) in enumerate(SHRUNK[:-1]):
        top, bottom, left, right = anyres.real_box(size, (columns, rows), side)
        canvas = tokens[row, 1 : 1 + columns * rows].reshape(rows, columns, side, side, 2)
        canvas = canvas.swapaxes(1, 2).reshape(rows * side, columns * side, 2)[top:bottom, left:right]
        height, width, _ = canvas.shape
        times = (height * width / (9 * side**2)) ** 0.5
        if times > 1.1:
            canvas, limit = resized(canvas, int(height // times), int(width // times)), limit + 1
        lines = np.concatenate([canvas, np.full((len(canvas), 1, 2), 9.0)], axis=1)
        expected = np.concatenate([tokens[row, 0], lines.reshape(-1, 2)])
        assert found.valid_BM[row, : len(expected)].all() and not found.valid_BM[row, len(expected) :].any()
        np.testing.assert_allclose(found.tokens_BMD[row, : len(expected)], expected, atol=1e-5)
        # Every patch that shows the picture belongs to one token, and no newline has a patch or a place.
        homes = found.source_BP[row, side**2 :]
        assert (homes >= 0).sum() == height * width
        np.testing.assert_array_equal(np.bincount(homes[homes >= 0], minlength=length)[9:], found.size_BM[row, 9:])
        newlines = np.flatnonzero((found.tokens_BMD[row] == 9.0).all(-1) & found.valid_BM[row])
        assert len(newlines) == len(canvas) and (found.position_BM[row, newlines] == -1).all()
        assert (found.size_BM[row, 9 : len(expected)] > 0).sum() == len(expected) - 9 - len(canvas)
        kept = homes[(homes >= 0)]
        if times <= 1.1:  # as it was
            places = np.tile(np.arange(side**2), pictures - 1)[homes >= 0]
            np.testing.assert_array_equal(found.position_BM[row, kept], places)
    assert limit == 3
    assert not found.valid_BM[-1, 9:].any()


def test_sides_are_rounded_as_in_float64():
    """A square of 5 x 5 tiles of 27 patches: 135 / (135 / 81) comes out as 80.99...; 6 x 6 tiles halve exactly."""
    sides = tiling.shrunk_sides(162, 27)
    assert sides[135, 135] == 80 and sides[162, 162] == 81 and sides[81, 81] == 81 and sides[89, 89] == 89
    assert (sides * sides.T).max() <= 1.1**2 * 9 * 27**2


def test_a_dropped_patch_has_no_token():
    """What is not valid leaves a gap where it is the nearest patch; newlines stay."""
    visual = whole(np.random.default_rng(0).normal(size=(1, 5, 9, 2)), 5, 3)
    valid = visual.valid_BM.copy()
    valid[1, 4] = False  # the middle of the first tile
    newline, tiles = np.full(2, 9.0, np.float32), np.array([(2, 2, 9, 9)], np.int32)
    full, less = (
        jax.device_get(shrink(dataclasses.replace(visual, valid_BM=mask), tiles, newline, side=3))
        for mask in (visual.valid_BM, valid)
    )
    gone = np.flatnonzero(full.valid_BM[0] != less.valid_BM[0])
    assert gone.tolist() == [9 + 7 + 1]  # behind the overview and the first line of 6 patches and a newline
    assert (full.source_BP == gone[0]).sum() == 1 and (less.source_BP == gone[0]).sum() == 0


def test_placeholders_become_one():
    """A separator between a picture and its VoCo tokens goes with them; text and rows of one picture stay."""
    i, v = IMAGE_ID, VOCO_ID
    ids = np.array([[1, i, 5, v, i, 5, v, 6, 7], [1, 8, i, v, i, v, i, v, 6], [1, i, v, 5, 6, 2, 0, 0, 0]], np.int32)
    found = tiling.one_placeholder({"ids": ids, "sample": (ids != 0).astype(np.int32), "more": 3})
    expected = [[1, i, 5, v, 0, 0, 0, 6, 7], [1, 8, i, v, 0, 0, 0, 0, 6], ids[2].tolist()]
    np.testing.assert_array_equal(found["ids"], expected)
    np.testing.assert_array_equal(found["sample"], np.array(expected) != 0)
    assert found["more"] == 3


NEXT = dataclasses.replace(tiny.MODEL, image_newline=True)
STITCHED = MethodConfig(packing="spatial_unpad", voco=2, voco_mask="voco")


def test_a_picture_in_tiles_is_one_picture_with_voco_tokens_of_its_own():
    """One segment, VoCo tokens once, positions without a gap, and no token of what is black."""
    visual = VisualTokens(
        tokens_BMD=np.random.default_rng(0).normal(size=(5, 16, 16)).astype(np.float32),
        valid_BM=np.ones((5, 16), bool),
        position_BM=np.tile(np.arange(16, dtype=np.int32), (5, 1)),
        size_BM=np.ones((5, 16), np.int32),
        source_BP=np.tile(np.arange(16, dtype=np.int32), (5, 1)),
    )
    batch = tiny.batch([[[tiny.BOS, *[IMAGE_ID, VOCO_ID] * 5, 7, 8]]], 14, count=5)
    batch["tiles"] = np.array([[2, 2, 20, 10]], np.int32)  # the middle 4 of 8 rows
    params = {**tiny.params(), "image_newline": np.full(16, 3.0, np.float32)}
    embed = functools.partial(vlm.embed, NEXT, method=STITCHED, voco_count=2, key=jax.random.key(0), visual=visual)
    x, slots, packed, _ = jax.jit(lambda params, batch: embed(params, batch))(params, batch)
    stream = jax.tree.map(lambda leaf: np.asarray(leaf[0]), slots.stream)
    real = stream.kind != PAD
    assert x.shape[1] == 14 + (5 * 16 + 4 * 4 - 1) + (2 - 1)
    assert stream.kind[real].tolist()[1:] == [VISION] * (16 + 4 * 9) + [VOCO] * 2 + [TEXT] * 2
    assert set(stream.segment[(stream.kind == VISION) | (stream.kind == VOCO)]) == {1}
    np.testing.assert_array_equal(stream.position[real], np.arange(real.sum()))
    seen = np.asarray(x[0])[stream.kind == VISION]
    np.testing.assert_array_equal(seen[:16], visual.tokens_BMD[0])
    np.testing.assert_array_equal(seen[[24, 33, 42, 51]], np.full((4, 16), 3.0))
    # The first row that shows the picture is the third one of the upper tiles.
    np.testing.assert_array_equal(seen[16:24], np.concatenate([visual.tokens_BMD[1][8:12], visual.tokens_BMD[2][8:12]]))
    assert packed.valid_BM.shape == (1, 5 * 16 + 4 * 4)
    # Below its limit "anyres_max_9" is the same, in fewer slots than 4 tiles have.
    other = functools.partial(embed, method=dataclasses.replace(STITCHED, packing="anyres_max_9"))
    again, more, _, _ = jax.jit(lambda params, batch: other(params, batch))(params, batch)
    np.testing.assert_array_equal(again[0][more.stream.kind[0] != PAD], x[0][real])
    # It learns from each of the four rows.
    learnt = jax.grad(lambda newline: embed({**params, "image_newline": newline}, batch)[0].sum())
    np.testing.assert_array_equal(jax.jit(learnt)(params["image_newline"]), np.full(16, 4.0))
    for lacking, message in ((batch, "image_newline"), ({**batch, "tiles": None}, "tiles")):
        kept = {name: leaf for name, leaf in lacking.items() if leaf is not None}
        with pytest.raises(ValueError, match=rf"'spatial_unpad' needs .*{message}"):
            embed(tiny.params() if message == "image_newline" else params, kept)


def test_every_tile_has_the_budget_and_none_sees_another():
    """VisionZip leaves 6 tokens of each of 1 + 4 tiles, those of a tile alone whatever the others show."""
    method = MethodConfig(encoder="visionzip", tokens=6, options={"contextual": 2})
    encode = jax.jit(lambda images: vlm.encode(tiny.MODEL, tiny.params(), images, method, jax.random.key(0))[0])
    images = tiny.images(1, 5)
    other = images.copy()
    other[0, 2] = tiny.images(1, 1, seed=1)[0, 0]
    first, second = jax.device_get(encode(images)), jax.device_get(encode(other))
    assert first.valid_BM.shape == (1 + 4, 6) and first.valid_BM.sum() == 6 * (1 + 4)
    same = [np.array_equal(first.tokens_BMD[tile], second.tokens_BMD[tile]) for tile in range(5)]
    assert same == [True, True, False, True, True]
    assert [np.array_equal(first.source_BP[tile], second.source_BP[tile]) for tile in range(5)] == same


def test_the_newline_is_a_parameter():
    shapes = jax.eval_shape(functools.partial(vlm.init, NEXT, "mlp2x_gelu"), jax.random.key(0))
    assert shapes["image_newline"].shape == (16,)
    assert "image_newline" not in tiny.params()
    assert first_match(optim.DECAY, "image_newline", name="decay") is False
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    assert not any(sharding.spec_for(mesh, "image_newline", (16,)))


RUN = RunConfig(
    model=dataclasses.replace(NEXT, llm=dataclasses.replace(NEXT.llm, vocab_size=512, max_positions=256)),
    data=DataConfig(tiles=((1, 2), (2, 2)), images=5, questions=1),
    stages={"base": StageConfig()},
    eval=EvalConfig(upper="base", lower="base"),
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.image_newline": False}, r"packing = 'spatial_unpad' needs .* set model\.image_newline = True"),
        ({"data.tiles": ()}, r"packing = 'spatial_unpad' puts tiles .* data\.tiles = \(\) cuts none"),
        ({"method.projector": "pixel_unshuffle"}, r"packing = 'spatial_unpad' needs tokens with a place in their tile"),
        ({"method.positions": "raster"}, r"positions = 'raster' is for whole pictures, not for .*'spatial_unpad'"),
        (
            {"method.decoder": "fastv", "method.decoder_layers": (1,), "method.decoder_keep": (4,)},
            r"decoder = 'fastv' has a budget a tile; packing = 'spatial_unpad' must be 'tiles'",
        ),
        ({"method.packing": "unpad"}, r"rows\.base\.method\.packing = 'unpad'"),
        (
            {"method.packing": "anyres_max_9", "method.encoder": "random", "method.tokens": 4},
            r"packing = 'anyres_max_9' resizes whole pictures, of which .*encoder = 'random' leaves parts",
        ),
        # 128 ids, of which one becomes 5 * 16 + 4 * 4 tokens.
        ({"model.llm.max_positions": 222}, r"with 1 x \(96 visual \+ 0 VoCo\) tokens needs 223"),
    ],
)
def test_packing_that_cannot_be_is_refused(changes, message):
    cfg, method = RUN, MethodConfig(packing="spatial_unpad")
    config_check.validate(dataclasses.replace(cfg, rows={"base": RowConfig(method=method)}))
    for key, value in changes.items():
        first, *names = key.split(".")
        if first == "method":
            method = dataclasses.replace(method, **{names[0]: value})
        elif names[0] == "llm":
            llm = dataclasses.replace(cfg.model.llm, max_positions=value)
            cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, llm=llm))
        else:
            cfg = dataclasses.replace(cfg, **{first: dataclasses.replace(getattr(cfg, first), **{names[0]: value})})
    with pytest.raises(ValueError, match=message):
        config_check.validate(dataclasses.replace(cfg, rows={"base": RowConfig(method=method)}))
