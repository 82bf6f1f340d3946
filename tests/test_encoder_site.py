"""Every encoder-site method in the stack: budgets, books, independence of rows, gradients, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import merging
import numpy as np
import pytest
import tiny_model as tiny

from tokzip_jax import (
    compress,
    config_check,
    config_io,
    encoder_site,
    generate,
    llm,
    masks,
    method_check,
    stack,
    vlm,
    voco,
)
from tokzip_jax.compress import ENCODER, Ask, Tower, downsample, resize_positions, restore
from tokzip_jax.compress.cdpruner import cdpruner
from tokzip_jax.compress.divprune import divprune
from tokzip_jax.config import DataConfig, EvalConfig, MethodConfig, RowConfig, RunConfig, StageConfig
from tokzip_jax.types import IMAGE_ID, TEXT, VISION, VisionFeatures

CFG = tiny.MODEL  # 4 x 4 patches, two blocks before the features
CASES = {
    "none": MethodConfig(),
    "random": MethodConfig(encoder="random", tokens=5),
    "uniform": MethodConfig(encoder="uniform", tokens=5),
    "downsample": MethodConfig(encoder="downsample", tokens=4),
    "cls_attention": MethodConfig(encoder="cls_attention", tokens=5, options={"order": "lowest"}),
    "visionzip": MethodConfig(encoder="visionzip", tokens=6, options={"contextual": 2}),
    "visionzip_merged": MethodConfig(encoder="visionzip_merged", tokens=3, options={"contextual": 1}),
    "vispruner": MethodConfig(encoder="vispruner", tokens=6, options={"step": 2}),
    "prumerge": MethodConfig(encoder="prumerge", tokens=6, options={"neighbours": 3, "count": "fixed"}),
    "prumerge_plus": MethodConfig(encoder="prumerge_plus", tokens=9, options={"neighbours": 3, "merge": "paper"}),
    "holov": MethodConfig(encoder="holov", tokens=6, options={"crops": 4}),
    "scope": MethodConfig(encoder="scope", tokens=5),
    "tome": MethodConfig(encoder="tome", tokens=7),
    "tome_features": MethodConfig(encoder="tome_features", tokens=5),
    "folder": MethodConfig(encoder="folder", tokens=5),
    "folder_block": MethodConfig(encoder="folder_block", tokens=5),
    "divprune": MethodConfig(encoder="divprune", tokens=5),
    "dart": MethodConfig(encoder="dart", tokens=6, options={"pivots": 2}),
    "cdpruner": MethodConfig(encoder="cdpruner", tokens=5),
    "mmtok": MethodConfig(encoder="mmtok", tokens=5),
    "restore": MethodConfig(encoder="cls_attention", tokens=6, options={"restore": 0.5}),
}
FEWER = {"prumerge_plus", "holov"}  # may leave slots empty
EVERY = pytest.mark.parametrize("name", CASES)


def test_merged_patches_are_scored_over_the_whole_picture_in_a_tower_of_windows():
    """Within windows of a group's size all groups would score alike, and the first ones be kept of every picture."""
    rng = np.random.default_rng(3)
    names = ("last_queries_BSD", "last_keys_BSD")
    signals = {name: rng.normal(size=(6, 65, 8)).astype(np.float32) for name in names}
    patches = rng.normal(size=(6, 64, 5)).astype(np.float32)
    tower = Tower(rows=8, columns=8, cls=True, heads=2, window=2)
    entry = ENCODER["visionzip_merged"]
    found = entry.function(VisionFeatures(patches, patches[:, 0], signals), Ask(4, entry.options(), tower, None))
    queries, keys = (signals[name][:, 1:].reshape(6, 64, 2, 4) for name in names)
    weight = np.exp(np.einsum("bqnh,bknh->bnqk", queries, keys) / 2)
    score = (weight / weight.sum(axis=3, keepdims=True)).mean(axis=(1, 2)).reshape(6, 4, 2, 4, 2).mean(axis=(2, 4))
    groups = np.sort(np.argsort(-score.reshape(6, 16), axis=1)[:, :4], axis=1)
    np.testing.assert_array_equal(found.position_BM, groups // 4 * 16 + groups % 4 * 2)
    assert len(np.unique(groups, axis=0)) == 6


def asked(question):
    """A row: a picture, its question, an answer."""
    return [[tiny.BOS, IMAGE_ID], (question, {"thread": 1}), ([9, 2], {"thread": 1, "supervised": True})]


ROWS = [asked([5, 6, 7, 8]), asked([4]), asked([10, 11])]
BATCH = tiny.batch(ROWS, 9)


@functools.partial(jax.jit, static_argnames="method")
def program(params, batch, method):
    """Up to the language model's first layer: behind it, all methods are alike."""

    def loss(params):
        x, slots, visual, _ = vlm.embed(CFG, params, batch, method, voco_count=0, key=jax.random.key(method.seed))
        return jnp.sum(x**2), (visual, slots.stream.kind)

    (_, (visual, kind)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return visual, kind, grads


@functools.cache
def found(name):
    """(visual tokens, kinds, gradients) of the three rows."""
    return jax.device_get(program(tiny.params(), BATCH, CASES[name]))


def places(name, batch):
    return np.asarray(program(tiny.params(), batch, CASES[name])[0].position_BM)


def test_every_method_has_a_case():
    assert {method.encoder for method in CASES.values()} == set(ENCODER)


@EVERY
def test_budget_and_books(name):
    """As many slots as the budget says, all filled or hidden from the language model; sizes, places, sources."""
    method, (visual, kind, _) = CASES[name], found(name)
    slots = vlm.visual_slots(CFG, method)
    assert visual.tokens_BMD.shape == (3, slots, CFG.llm.width) and slots == (method.tokens or 16)
    assert visual.position_BM.dtype == visual.size_BM.dtype == visual.source_BP.dtype == np.int32
    assert name in FEWER or visual.valid_BM.all()
    assert visual.valid_BM.any(axis=1).all()
    np.testing.assert_array_equal((kind == VISION).sum(axis=1), visual.valid_BM.sum(axis=1))
    entry = ENCODER[method.encoder]
    merging.assert_books(visual, 16, dropped=entry.selects or name == "prumerge_plus")
    if entry.selects and name not in ("visionzip", "restore"):
        # What a selection passes on are patches as they are.
        projected = found("none")[0].tokens_BMD
        expected = np.take_along_axis(projected, np.maximum(visual.position_BM, 0)[:, :, None], axis=1)
        tiny.close(visual.tokens_BMD[visual.valid_BM], expected[visual.valid_BM])


@EVERY
def test_a_picture_is_compressed_by_itself(name):
    """Another second picture changes nothing of the first and the third; the question counts where it should."""
    other = {**BATCH, "images": BATCH["images"].copy()}
    other["images"][1] = tiny.images(1, seed=5)[0]
    again, first = jax.device_get(program(tiny.params(), other, CASES[name]))[0], found(name)[0]
    for row in (0, 2):
        np.testing.assert_array_equal(again.position_BM[row], first.position_BM[row])
        tiny.close(again.tokens_BMD[row], first.tokens_BMD[row])
    assert np.abs(again.tokens_BMD[1] - first.tokens_BMD[1]).max() > 1e-3
    asked_else = tiny.batch([asked([20, 21, 3, 30]), asked([29]), asked([12, 25])], 9)
    assert ENCODER[CASES[name].encoder].question == bool((places(name, asked_else) != first.position_BM).any())


@EVERY
def test_gradients_pass_the_selection(name):
    grads = found(name)[2]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    for part in ("vit", "projector", "llm"):
        assert any(np.any(leaf) for leaf in jax.tree.leaves(grads[part]))


def test_words_of_the_question_and_projected_patches():
    """CDPruner and DivPrune on what the uncompressed model hands to the language model."""
    projected = found("none")[0].tokens_BMD
    table = np.asarray(tiny.params()["llm"]["embed"]["table"], float)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    rows = zip(([5, 6, 7, 8], [4], [10, 11]), projected.astype(float))
    relevance = np.stack([(unit(x) @ unit(table[words]).T).mean(axis=1) for words, x in rows]).astype(np.float32)
    expected = cdpruner(projected, relevance, tokens=5, sign="plain").position_BM
    np.testing.assert_array_equal(found("cdpruner")[0].position_BM, expected)
    np.testing.assert_array_equal(found("divprune")[0].position_BM, divprune(projected, tokens=5).position_BM)


def test_raster_positions_in_the_model():
    """A token stands on the id of its place, text behind all sixteen patches."""
    kept = dataclasses.replace(CASES["restore"], positions="raster")
    run = jax.jit(lambda p, b: vlm.forward(CFG, p, b, kept).layout.stream)
    stream = jax.device_get(run(tiny.params(), BATCH))
    for row, place in enumerate(found("restore")[0].position_BM):
        np.testing.assert_array_equal(stream.position[row][stream.kind[row] == VISION], 1 + place)
        text = stream.position[row][stream.kind[row] == TEXT]
        np.testing.assert_array_equal(text, 1 + 16 + np.arange(len(text)))
    for wrong in ({"voco": 1, "voco_mask": "voco"}, {"projector": "qformer"}):
        with pytest.raises(ValueError, match=r"x\.positions = 'raster' needs tokens with a place each, which"):
            method_check.check("x", dataclasses.replace(MethodConfig(positions="raster"), **wrong), CFG)


CALIBRATED = dataclasses.replace(CASES["restore"], positions="raster", attention_bias=True)


def test_attention_bias_in_the_model():
    """All layers weigh keys by size and distance: against attention that adds the formula pair by pair."""
    tokens = found("restore")[0]
    x, slots, _, _ = jax.jit(
        lambda p, b: vlm.embed(CFG, p, b, CALIBRATED, voco_count=0, key=jax.random.key(0), visual=tokens)
    )(tiny.params(), BATCH)
    stream = jax.device_get(slots.stream)
    for row, sizes in enumerate(tokens.size_BM):
        np.testing.assert_array_equal(stream.size[row][stream.kind[row] == VISION], sizes)
        assert not stream.size[row][stream.kind[row] != VISION].any()
    assert stream.size.max() > 1
    table = masks.TABLES["visible"]
    plain = dataclasses.replace(slots.stream, size=None)
    mask = np.asarray(masks.visibility(plain, plain, table))
    frequencies = CFG.llm.rope_theta ** (-np.arange(0, CFG.llm.head_dim, 2) / CFG.llm.head_dim)
    bias = np.zeros(mask.shape)
    for row, query, key in np.ndindex(*mask.shape):
        distance = int(stream.position[row, query]) - int(stream.position[row, key])
        bias[row, query, key] = np.log(max(stream.size[row, key], 1) * (2 - np.cos(distance * frequencies).mean()))

    def attention(q, k, v):
        k, v = (jnp.repeat(part, q.shape[1] // k.shape[1], axis=1) for part in (k, v))
        logits = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[3]) + bias[:, None]
        return jax.nn.softmax(jnp.where(mask[:, None], logits, -1e30), axis=-1) @ v

    blocks, table = tiny.params()["llm"]["layers"], jnp.asarray(table)
    expected, _ = llm.run_layers(CFG, blocks, x, plain, table, attention=attention)
    rows = jnp.full((3, 1), 6, jnp.int32)
    result, read = llm.run_layers(CFG, blocks, x, slots.stream, table, rows=rows)
    without, unweighed = llm.run_layers(CFG, blocks, x, plain, table, rows=rows)
    real = stream.kind > 0
    tiny.close(result[real], expected[real])
    assert np.abs(np.asarray(result - without))[real].max() > 0.1
    # Rows that a method reads are weighed too: in the first layer by the bias, up to what makes the sum one.
    ratio = np.log(read["scores"][0][:, 0, 0] / unweighed["scores"][0][:, 0, 0]) - bias[:, 6]
    for weights, seen in zip(ratio, mask[:, 6]):
        np.testing.assert_allclose(weights[seen], weights[seen][0], atol=1e-4)
    with pytest.raises(ValueError, match=r"attention= is for whole rows: .* nor stream\.size"):
        llm.run_layers(CFG, blocks, x, slots.stream, table, attention=attention)


def test_attention_bias_in_cached_decoding():
    """Tokens that were decoded one by one are those that the whole row says."""
    prompts = [[[tiny.BOS, IMAGE_ID], question] for question in ([5, 6, 7, 8], [4, 4, 4, 4], [10, 11, 12, 13])]
    params, blocks = tiny.params(), stack.unstack(tiny.params()["llm"]["layers"])
    table = jnp.asarray(masks.TABLES["visible"])

    @jax.jit
    def write(batch):
        prompt = generate.prefill(CFG, params, batch, CALIBRATED, max_new=3)
        return generate.decode(CFG, params, blocks, prompt, max_new=3, eos_id=-1, table=table)[0]

    tokens = np.asarray(write(tiny.batch(prompts, 6)))
    whole = tiny.batch([[*prompt, row.tolist()] for prompt, row in zip(prompts, tokens)], 9)
    run = jax.jit(lambda b: vlm.forward(CFG, params, b, CALIBRATED).hidden_BTD)
    said = llm.logits(CFG, params["llm"], run(whole))[:, -4:-1].argmax(axis=-1)
    np.testing.assert_array_equal(said, tokens)
    plain = dataclasses.replace(CALIBRATED, attention_bias=False)
    assert not np.allclose(run(whole), jax.jit(lambda b: vlm.forward(CFG, params, b, plain).hidden_BTD)(whole))


@pytest.mark.parametrize(
    ("cfg", "changes"),
    [
        (CFG, {"voco": 1, "voco_mask": "voco", "positions": "original"}),
        (CFG, {"decoder": "fastv", "decoder_layers": (1,), "decoder_keep": (4,)}),
        (dataclasses.replace(CFG, attention="cudnn"), {}),
    ],
)
def test_attention_bias_that_cannot_be(cfg, changes):
    with pytest.raises(ValueError, match=r"x\.attention_bias = True (weighs|cannot be with model\.attention)"):
        method_check.check("x", dataclasses.replace(CALIBRATED, **changes), cfg)


def test_downsampling_is_a_smaller_model_on_smaller_pictures():
    small = dataclasses.replace(CFG, vit=dataclasses.replace(CFG.vit, image_size=16))
    params = tiny.params()
    params = {**params, "vit": {**params["vit"], "pos": resize_positions(params["vit"]["pos"], grid=2)}}
    pictures = downsample(jnp.asarray(BATCH["images"][:, 0]), side=16)[:, None]
    plain = jax.jit(lambda p, x: vlm.encode(small, p, x, MethodConfig(), jax.random.key(0))[0].tokens_BMD)
    tiny.close(found("downsample")[0].tokens_BMD, plain(params, pictures))


def test_restore_goes_round_any_selection():
    """Half of the budget to the selection, the rest made of what it dropped."""
    rng = np.random.default_rng(0)
    features = VisionFeatures(
        patches_BPD=rng.normal(size=(2, 16, 4)).astype(np.float32),
        cls_BD=rng.normal(size=(2, 4)).astype(np.float32),
        signals={"cls_attention_BP": rng.random((2, 16), np.float32)},
    )
    tower = Tower(rows=4, columns=4)
    for name, share, kept in (
        ("cls_attention", 0.5, 3),
        ("scope", 0.5, 3),
        ("vispruner", 0.25, 5),
        ("uniform", 0.9, 0),
    ):
        ask = Ask(7, compress.options(name, {"restore": share}), tower)
        if not kept:
            with pytest.raises(
                ValueError, match=r"options\.restore = 0\.9 of 7 tokens leaves none to the selection; it"
            ):
                compress.check(name, tower, 7, ask.options)
            continue
        compress.check(name, tower, 7, ask.options)
        base = ENCODER[name].function(features, ask._replace(tokens=kept))
        result = compress.apply(name, features, ask)
        for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(restore(base, features.patches_BPD, tokens=7))):
            np.testing.assert_array_equal(a, b)
        merging.assert_books(result, 16)
    with pytest.raises(ValueError, match=r"restore: 17 tokens asked of 16 patches, 8 of them kept"):
        compress.check("uniform", tower, 17, compress.options("uniform", {"restore": 0.5}))


def method(encoder, tokens=4, **options):
    return MethodConfig(encoder=encoder, tokens=tokens, options=options)


WINDOWS = dataclasses.replace(CFG, vit=dataclasses.replace(CFG.vit, window=2))
QFORMER = {"projector": "qformer"}
REFUSED = {
    "unknown method": (CFG, method("zip"), r"x\.encoder = 'zip' is unknown; choose one of 'cdpruner', .*'vispruner'$"),
    "unknown option": (
        CFG,
        method("visionzip", contextuals=1),
        r"x\.options\.contextuals is no option of the encoder-site method 'visionzip'; did you mean contextual\? It "
        "has: restore, contextual, merge, targets$",
    ),
    "no options": (
        CFG,
        method("tome_features", order=1),
        r"x\.options\.order is no option .*'tome_features'\. It has none",
    ),
    "a float": (CFG, method("vispruner", step=2.0), r"x\.options\.step = 2\.0 \(float\) must be int"),
    "a bool": (CFG, method("vispruner", step=True), r"x\.options\.step = True \(bool\) must be int"),
    "a word": (CFG, method("vispruner", important="a"), r"x\.options\.important = 'a' \(str\) must be float"),
    "choice": (
        CFG,
        method("cls_attention", order="up"),
        r"x\.options\.order = 'up' is unknown; choose one of 'highest', '",
    ),
    "too low": (CFG, method("vispruner", step=0), r"x\.options\.step = 0 must be at least 1"),
    "out of range": (
        CFG,
        method("vispruner", important=1.5),
        r"x\.options\.important = 1\.5 must lie between 0\.0 and 1\.0",
    ),
    "not above": (CFG, method("mmtok", text_temperature=0), r"x\.options\.text_temperature = 0 must be above 0\.0"),
    "nan": (CFG, method("scope", alpha=float("nan")), r"x\.options\.alpha = nan must be at least 0\.0"),
    "cls_attention": (
        CFG,
        method("cls_attention", 17),
        r"x: cls_attention: 17 tokens asked of 16 patches; it must be 1 \.\. 16",
    ),
    "visionzip": (CFG, method("visionzip", 18), r"x: visionzip: 18 tokens .* must be 1 \.\. 17"),
    "dominant": (CFG, method("visionzip", 4, contextual=4), r"x: visionzip: 4 contextual of 4 tokens leave no place"),
    "nothing dropped": (
        CFG,
        method("visionzip", 8, contextual=2, restore=0.5),
        r"x: visionzip: options\.contextual = 2 leaves no patch to options\.restore = 0\.5; one of them must be 0",
    ),
    "groups": (
        CFG,
        method("visionzip_merged", 5),
        r"x: visionzip_merged: 5 tokens asked of 4 groups; it must be 1 \.\. 4",
    ),
    "group side": (
        CFG,
        method("visionzip_merged", side=3),
        r"x: .*groups of 3 x 3 patches do not fill a grid of 4 x 4",
    ),
    "merged": (CFG, method("visionzip_merged", 3, contextual=4), r"x: visionzip_merged: 4 contextual of 3 .* 0 \.\. 3"),
    "neighbours": (
        CFG,
        method("prumerge"),
        r"x: PruMerge: neighbours = 32 of each of 16 patches; it must be 1 \.\. 15",
    ),
    "crops": (CFG, method("holov", crops=17), r"x: holov: crops = 17 asked of 16 patches; it must be 1 \.\. 16"),
    "pivots": (CFG, method("dart", 3), r"x: dart: pivots = 4 asked of 3 tokens; it must be 1 \.\. 3"),
    "folder": (CFG, method("folder", 1), r"x: FOLDER: 1 tokens asked of 16 patches; it must be 2 \.\. 16"),
    "tome": (CFG, method("tome", 3), r"x: ToMe: 3 of 16 patches after 2 blocks .* use more blocks or more tokens"),
    "no square": (
        CFG,
        method("downsample", 5),
        r"x: downsample: 5 tokens are no smaller square grid; tokens must be the",
    ),
    "no window": (
        WINDOWS,
        method("downsample", 9),
        r"x: downsample: 9 tokens make 3 x 3 patches, which windows of 2 do not",
    ),
    "cudnn": (
        dataclasses.replace(CFG, attention="cudnn"),
        method("tome", 7),
        r"x\.options\.proportional = True adds .* 'cudnn' cannot; use 'auto', 'einsum', 'xla', or options\.prop",
    ),
    "question behind a Q-Former": (
        CFG,
        dataclasses.replace(method("cdpruner"), **QFORMER),
        r"x\.encoder = 'cdpruner' reads every patch .* x\.projector = 'qformer' does not work patch by patch; choose "
        r"one of [^.]*$",
    ),
    "patches behind a Q-Former": (
        CFG,
        dataclasses.replace(method("divprune"), **QFORMER),
        r"x\.encoder = 'divprune' .* patch by patch; choose one of .*, or x\.options\.compare = 'patches'$",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_one_sentence(name):
    cfg, wrong, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"^{message}") as error:
        encoder_site.check("x", cfg, wrong)
    assert "\n" not in str(error.value)


def test_what_can_work_passes():
    for case in CASES.values():
        encoder_site.check("x", CFG, case)
    encoder_site.check("x", CFG, dataclasses.replace(method("divprune", compare="patches"), **QFORMER))
    encoder_site.check("x", dataclasses.replace(CFG, attention="cudnn"), method("tome", 7, proportional=False))
    encoder_site.check("x", WINDOWS, method("downsample", 4))


def test_config_round_trip():
    cfg = RunConfig(rows={name: RowConfig(method=case) for name, case in CASES.items()})
    assert config_io.from_json(config_io.to_json(cfg)) == cfg
    assert config_io.from_config_dict(config_io.to_config_dict(cfg)) == cfg
    assert len({row.method for row in cfg.rows.values()}) == len(CASES)


def test_towers_without_a_cls_token_or_a_square():
    """Our tower has both; what somebody else's lacks is named, with what would do."""
    bare, wide = Tower(rows=4, columns=4, cls=False, blocks=2), Tower(rows=4, columns=8, blocks=2)
    for case in CASES.values():
        entry, options = ENCODER[case.encoder], compress.options(case.encoder, case.options)
        if entry.cls:
            with pytest.raises(
                ValueError, match=rf"^{case.encoder} needs a CLS token, .*need none: .*\bdivprune, .*\buniform"
            ):
                compress.check(case.encoder, bare, case.tokens, options)
        else:
            compress.check(case.encoder, bare, case.tokens, options)
        if entry.square:
            with pytest.raises(ValueError, match=rf"^{case.encoder} needs a square grid .* is 4 x 8"):
                compress.check(case.encoder, wide, case.tokens, options)


def test_a_method_that_reads_the_question_has_one_a_row():
    rows = {"a": RowConfig(method=method("cdpruner", 5)), "upper": RowConfig(), "lower": RowConfig()}
    cfg = RunConfig(
        model=CFG,
        data=DataConfig(text_length=32, vocab_size=32, questions=1),
        stages={"base": StageConfig()},
        rows=rows,
        eval=EvalConfig(),
    )
    config_check.validate(cfg)
    with pytest.raises(
        ValueError, match=r"rows\.a\.method\.encoder = 'cdpruner' reads the question, .*questions = 2 must be 1"
    ):
        config_check.validate(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, questions=2)))
    with pytest.raises(ValueError, match=r"encoder = 'mmtok' reads the question: give vlm\.encode text=\(ids, valid\)"):
        vlm.encode(CFG, tiny.params(), BATCH["images"], CASES["mmtok"], jax.random.key(0))
    hidden = dataclasses.replace(CASES["mmtok"], voco=1, voco_mask="voco")
    with pytest.raises(
        ValueError, match=r"encoder = 'mmtok' reads the question, so that a picture's cache would serve"
    ):
        voco.build(CFG, {}, BATCH, hidden)


def test_the_table_of_methods():
    lines = compress.table().splitlines()
    assert len(lines) == 2 + len(ENCODER)
    assert (
        "| [cdpruner](tokzip_jax/compress/cdpruner.py) | similarity, query | question, projected patches | - |"
        in lines[-2]
    )
    assert "| no | arXiv 2506.10967 |" in lines[-2]
    assert all(set(entry.classes) <= set(compress.entry.CLASSES) for entry in ENCODER.values())
