"""The data set `clips`: answers from the facts, what reversing and shuffling do to them, rows of several pictures."""

import collections
import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from tokzip_jax import config_check, layout, report, sharding, step_times, training
from tokzip_jax.config import (
    DataConfig,
    EvalConfig,
    LlmConfig,
    MeshConfig,
    MethodConfig,
    ModelConfig,
    RowConfig,
    RunConfig,
    ScenesConfig,
    StageConfig,
    VitConfig,
)
from tokzip_jax.data import actors, clip_questions, clips, pipeline, rows, shapes, sources
from tokzip_jax.data import tokenizer as bpe
from tokzip_jax.evals import runner
from tokzip_jax.evals.scoring import question_only_prior
from tokzip_jax.types import IMAGE_ID, TEXT, VISION, VOCO, VOCO_ID
from tokzip_jax.workdir import Workdir

FRAMES = 5
SMALL = ScenesConfig(train=30, validation=2, test=6, frames=FRAMES)
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    cfg = DataConfig(
        name="clips", data_dir=folder, scenes=SMALL, text_length=96, caption_length=12, images=FRAMES, vocab_size=400
    )
    sources.load(cfg, "train")
    return cfg


@pytest.fixture(scope="module")
def tok(built):
    return bpe.train(sources.texts(sources.load(built, "train")), built.vocab_size)


@pytest.fixture(scope="module")
def many():
    """500 clips of the default difficulty."""
    return [clips.example(ScenesConfig(), "train", index) for index in range(500)]


def ordered(cfg, frame_order, images=FRAMES):
    scenes = dataclasses.replace(cfg.scenes, frame_order=frame_order)
    return dataclasses.replace(cfg, scenes=scenes, images=images)


def backwards(facts, frames):
    """The facts of the reversed clip."""
    return [{**f, "first": frames - f["first"] - len(f["path"]), "path": f["path"][::-1]} for f in facts]


def extreme(facts, word):
    """The one thing that appears first, or last."""
    starts = [fact["first"] for fact in facts]
    when = min(starts) if word == "first" else max(starts)
    assert starts.count(when) == 1
    return facts[starts.index(when)]


def way(fact):
    """The direction of a path of equal steps along one axis; "" where it rests."""
    steps = np.diff(np.array(fact["path"]), axis=0)
    np.testing.assert_allclose(steps, np.broadcast_to(steps.mean(0), steps.shape), atol=0.0011)
    moved = steps.sum(0)
    if not moved.any():
        return ""
    assert 0.24 < abs(moved).sum() < 0.51
    return next(name for name, sign in WAYS.items() if (np.sign(moved) == sign).all())


def read(question, facts, frames):
    """The answer from the facts, by other code than that which asked; raises where it would be in doubt."""
    named = {f"{fact['color']} {fact['shape']}": fact for fact in facts}
    assert len(named) == len(facts)
    if found := re.fullmatch(r"what appears (first|last)\?", question):
        fact = extreme(facts, found[1])
        return f"{fact['color']} {fact['shape']}"
    if found := re.fullmatch(r"what (color|shape) is the object that appears (first|last)\?", question):
        return extreme(facts, found[2])[found[1]]
    if found := re.fullmatch(r"does the (\w+ \w+) appear before the (\w+ \w+)\?", question):
        one, other = (named[name]["first"] for name in found.groups())
        assert one != other
        return "yes" if one < other else "no"
    if found := re.fullmatch(r"where does the (\w+ \w+) move\?", question):
        return way(named[found[1]]) or pytest.fail("it rests")
    if found := re.fullmatch(r"what moves (\w+)\?", question):
        (name,) = [name for name, fact in named.items() if way(fact) == found[1]]
        return name
    if found := re.fullmatch(r"how many objects are there at the (start|end)\?", question):
        frame = 0 if found[1] == "start" else frames - 1
        return str(sum(fact["first"] <= frame < fact["first"] + len(fact["path"]) for fact in facts))
    found = re.fullmatch(r"how many (?:(\w+) )?(\w+) appear in all\?", question)
    if found[2] != "objects":
        return str(sum(found[2] in (fact["shape"] + "s", fact["shape"] + "es") for fact in facts))
    return str(sum(found[1] in (None, fact["color"]) for fact in facts))


@pytest.mark.parametrize("difficulty", shapes.LEVELS)
def test_answers_follow_from_the_facts(difficulty):
    settings = ScenesConfig(difficulty=difficulty, questions=16, frames=7)
    asked = collections.Counter()
    for index in range(40):
        example = clips.example(settings, "test", index)
        facts = json.loads(example["facts"])
        assert [read(question, facts, 7) for question in example["questions"]] == example["answers"]
        assert len(set(example["questions"])) == len(example["questions"])
        assert all(any(f["first"] <= i < f["first"] + len(f["path"]) for f in facts) for i in range(7))
        asked.update(example["types"])
    assert set(asked) == {"order", "direction", "count"} and min(asked.values()) > 50


def test_wording_does_not_tell_the_answer(many):
    prior = question_only_prior(many[:400], many[400:])
    assert prior.accuracy < 0.35 and max(prior.by_type.values()) < 0.42
    answers = collections.Counter(answer for example in many for answer in example["answers"])
    assert answers["yes"] + answers["no"] < 0.3 * answers.total()
    assert 0.45 < answers["yes"] / (answers["yes"] + answers["no"]) < 0.55
    ways = np.array([answers[name] for name in WAYS])
    assert ways.min() > 0.8 * ways.mean()


def test_order_is_not_in_the_frames(many):
    """The frames of a clip are those of its reverse, where every question about order has another answer.

    All order questions that can be asked about the one can be asked about the other, and a clip is as likely as its
    reverse, so that the set of frames says nothing about which of the two answers is right.
    """
    settings = ScenesConfig()
    asked = 0
    for index, example in enumerate(many[:300]):
        cast = actors.from_json(example["facts"])
        back = [actor.reversed(settings.frames) for actor in cast]
        flipped = backwards(json.loads(example["facts"]), settings.frames)
        assert json.loads(actors.to_json(back)) == flipped
        for template in clip_questions.templates(shapes.LEVELS["medium"]):
            if template.kind == "order":
                there, here = dict(template.pairs(back)), dict(template.pairs(cast))
                assert there.keys() == here.keys()
                assert all(there[question] != here[question] for question in here)
        for question, answer, kind in zip(example["questions"], example["answers"], example["types"]):
            if kind == "order":
                assert read(question, flipped, settings.frames) not in (answer, "")
                asked += 1
        if index < 20:
            level = shapes.LEVELS[settings.difficulty]
            film = clips.film(np.random.default_rng(index), cast, settings, level)
            again = clips.film(np.random.default_rng(index), back, settings, level)
            np.testing.assert_array_equal(film, again[::-1])
    assert asked > 300


def test_a_coin_decides_which_way_time_runs(monkeypatch):
    """The two ways of one staging are equally likely."""
    cast = clips.sample(np.random.default_rng(0), 6, shapes.LEVELS["easy"])
    monkeypatch.setattr(actors, "stage", lambda *_: cast)
    back = [actor.reversed(6) for actor in cast]
    rng = np.random.default_rng(1)
    drawn = [clips.sample(rng, 6, shapes.LEVELS["easy"]) for _ in range(400)]
    assert all(found in (cast, back) for found in drawn) and cast != back
    assert 160 < sum(found == cast for found in drawn) < 240


def test_frames_show_what_is_there():
    """Things are drawn in their own frames and in no others: the light background is seen there."""
    settings = ScenesConfig(difficulty="easy", frames=FRAMES)
    gone = 0
    for index in range(20):
        example = clips.example(settings, "train", index)
        assert example["image"].shape == (FRAMES, 64, 64, 3) and example["image"].dtype == np.uint8
        facts = json.loads(example["facts"])
        for frame, image in enumerate(example["image"]):
            seen = [f for f in facts if f["first"] <= frame < f["first"] + len(f["path"])]
            for fact in facts:
                if fact in seen:
                    x, y = fact["path"][frame - fact["first"]]
                    difference = image[int(y * 64), int(x * 64)].astype(int) - shapes.COLORS[fact["color"]]
                    assert abs(difference).max() < 8
            shown = (image.min(-1) < 130).any()
            assert shown == bool(seen)
            colors = {fact["color"] for fact in facts} - {fact["color"] for fact in seen}
            for color in colors:
                assert not (abs(image.astype(int) - shapes.COLORS[color]).max(-1) < 8).any()
                gone += 1
    assert gone > 20


def test_frame_orders(built):
    """All three read the same files; shuffled is a permutation of the example's own, the caption fits the first."""
    folders = sorted((clips.Clips(data_dir=built.data_dir, settings=built.scenes).data_path).parent.parent.iterdir())
    true, shuffled = (sources.load(ordered(built, name), "train") for name in ("true", "shuffled"))
    middle = sources.load(ordered(built, "middle", images=1), "train")
    assert sorted(folders[0].parent.iterdir()) == folders and len(folders) == 1
    orders = set()
    for index in range(len(true)):
        example = clips.example(SMALL, "train", index)
        np.testing.assert_array_equal(true.image(index), example["image"])
        order = shuffled.text(index)["order"]
        orders.add(tuple(order))
        assert sorted(order) == list(range(FRAMES))
        np.testing.assert_array_equal(shuffled.image(index), example["image"][order])
        np.testing.assert_array_equal(middle.image(index), example["image"][[FRAMES // 2]])
        assert [source.text(index)["frames"] for source in (true, shuffled, middle)] == [FRAMES, FRAMES, 1]
        facts = json.loads(example["facts"])
        for source, first in ((true, 0), (shuffled, order[0]), (middle, FRAMES // 2)):
            words = sorted(
                word for f in facts if f["first"] <= first < f["first"] + len(f["path"])
                for word in (f["color"], f["shape"])
            )  # fmt: skip
            assert sorted(source.text(index)["caption"].split()) == words
            assert source.text(index)["questions"] == example["questions"]
    assert len(orders) > 20
    assert orders != {tuple(clips.frame_order(dataclasses.replace(SMALL, frame_order="shuffled", seed=1), "train", i))
                      for i in range(30)}  # fmt: skip
    with pytest.raises(ValueError, match=r"data\.scenes\.frame_order = 'best' is unknown"):
        clips.frame_order(dataclasses.replace(SMALL, frame_order="best"), "train", 0)


MODEL = ModelConfig(
    vit=VitConfig(image_size=64, patch_size=16, width=16, layers=2, heads=2, mlp_dim=16),
    llm=LlmConfig(vocab_size=400, width=16, layers=2, heads=2, kv_heads=2, head_dim=8, mlp_dim=16, max_positions=256),
)


def run_config(built, **orders):
    """A run with a stage and a row for each of these orders, and questions of its data alone."""
    rows = {name: RowConfig(frame_order=order, stage=name) for name, order in orders.items()}
    stages = {name: StageConfig(frame_order=order, batch_size=2) for name, order in orders.items()}
    bounds = EvalConfig(upper="upper", lower="upper", batch_size=4)
    return RunConfig(model=MODEL, data=built, rows=rows, stages=stages, eval=bounds)


ORDERED = {"upper": "", "in order": "true", "mixed": "shuffled", "one": "middle"}


@pytest.mark.parametrize("name", ORDERED)
def test_a_stage_reads_its_frames(built, tok, name, monkeypatch, tmp_path):
    """In its own order, both where it is trained and where its steps are timed."""
    cfg = run_config(built, **ORDERED)
    workdir, mesh = Workdir(tmp_path), sharding.make_mesh(cfg.mesh)
    monkeypatch.setattr(Workdir, "load_tokenizer", lambda self, data: tok)
    given = []

    class Enough(Exception):
        pass

    def begun(data, tokenizer, **options):
        iterator = iterate(data, tokenizer, **options)
        given.append(next(iterator))
        raise Enough

    iterate = pipeline.train_iterator
    monkeypatch.setattr(pipeline, "train_iterator", begun)
    for start in (
        lambda: training.train_stage(cfg, name, mesh, workdir, None),
        lambda: step_times.TimedStage(cfg, name, workdir, mesh, {}),
    ):
        with pytest.raises(Enough):
            start()
    source = sources.load(ordered(built, ORDERED[name] or "true"), "train")
    seen = {source.image(index).tobytes() for index in range(len(source))}
    assert len(given) == 2
    for batch in given:
        assert batch["images"].shape[:2] == (2, 1 if name == "one" else FRAMES)
        assert all(frames.tobytes() in seen for frames in batch["images"])


def test_a_row_reads_its_frames(built, tok, monkeypatch, tmp_path):
    """And another order is another result, though the name and everything else is the same."""
    cfg = run_config(built, **ORDERED)
    config_check.validate(cfg)
    seen = []

    def scorer(model, method, questions, *rest):
        def score(params, inputs, *rest):
            seen.append(inputs)
            return np.ones((4, questions), bool)

        return score

    monkeypatch.setattr(runner, "_scorer", scorer)
    monkeypatch.setattr(runner.Runner, "load", lambda self, row: {})
    texts = [sources.load(built, "test").text(index) for index in range(SMALL.test)]
    mesh = sharding.make_mesh(MeshConfig(data=1, model=1), jax.devices()[:1])
    reader = runner.Runner(cfg, Workdir(tmp_path), mesh, tok, texts)
    asked = sum(len(text["questions"]) for text in texts)
    for name, order in ORDERED.items():
        seen.clear()
        assert reader.cached(name).accuracy == 1.0
        source, read = sources.load(ordered(built, order or "true"), "test"), set()
        for batch in seen:
            for example, frames in zip(np.asarray(batch["example"]), np.asarray(batch["images"])):
                if example >= 0:
                    np.testing.assert_array_equal(frames, source.image(example))
                    read.add(int(example))
        assert read == set(range(SMALL.test)) and asked > 0
    seen.clear()
    reader.cached("one")
    assert not seen
    other = dataclasses.replace(cfg.rows["one"], frame_order="shuffled")
    dataclasses.replace(reader, cfg=dataclasses.replace(cfg, rows={"one": other})).cached("one")
    assert seen and seen[0]["images"].shape[1] == FRAMES


def test_a_figure_shows_a_row_that_read_its_pictures(built, tok, monkeypatch):
    """The most VoCo tokens of the rows in the order of the data, not of those that read other frames."""
    methods = {
        order: MethodConfig(voco=count, voco_mask="voco") for order, count in (("", 1), ("true", 2), ("middle", 3))
    }
    rows = {f"row {order}": RowConfig(method=method, frame_order=order) for order, method in methods.items()}
    cfg = run_config(built, upper="")
    cfg = dataclasses.replace(cfg, rows={**cfg.rows, **rows})
    monkeypatch.setattr(report, "_looks", lambda model, params, inputs, method: np.zeros((2, 1, method.voco, 16)))
    monkeypatch.setattr(runner.Runner, "load", lambda self, row: {})
    mesh = sharding.make_mesh(MeshConfig(data=1, model=1), jax.devices()[:1])
    batch = {name: np.zeros((1, 1), np.int32) for name in runner.MODEL_INPUTS}
    (column,) = report._columns(runner.Runner(cfg, None, mesh, tok, []), batch)
    assert column(0).title.startswith("row true:") and column(0).attention_LkP.shape == (2, 2, 16)


def test_orders_need_room_for_their_frames(built):
    cfg = run_config(ordered(built, "middle", images=1), upper="", one="middle")
    config_check.validate(cfg)
    for key, change in (
        ("stages", {"upper": dataclasses.replace(cfg.stages["upper"], frame_order="true")}),
        ("rows", {"upper": dataclasses.replace(cfg.rows["upper"], frame_order="shuffled")}),
    ):
        with pytest.raises(ValueError, match=r"data\.images = 1 is too small for clips of data\.scenes\.frames = 5"):
            config_check.validate(dataclasses.replace(cfg, **{key: {**getattr(cfg, key), **change}}))


def test_every_order_is_as_likely():
    """Shuffling gives a frame every place equally often."""
    settings = dataclasses.replace(SMALL, frames=3, frame_order="shuffled")
    found = collections.Counter(tuple(clips.frame_order(settings, "test", index)) for index in range(600))
    assert len(found) == 6 and min(found.values()) > 70


def test_rows_of_several_pictures(built, tok):
    """[BOS], then [IMAGE][VOCO] a frame, then the questions as threads, in rows that hold every question once."""
    source = sources.load(built, "test")
    asked = []
    for batch in pipeline.eval_batches(built, tok, split="test", image_size=64, batch_size=4):
        assert batch["images"].shape == (4, FRAMES, 64, 64, 3) and batch["images"].dtype == np.uint8
        for ids, thread, supervised, images, example, numbers in zip(
            *(batch[key] for key in ("ids", "thread", "supervised", "images", "example", "question"))
        ):
            prefix = [bpe.BOS_ID, *[IMAGE_ID, VOCO_ID] * FRAMES]
            assert list(ids[: len(prefix)]) == prefix and not thread[: len(prefix)].any()
            assert not np.isin(ids[len(prefix) :], (IMAGE_ID, VOCO_ID)).any()
            if example < 0:
                continue
            np.testing.assert_array_equal(images, source.image(example))
            for place, number in enumerate(numbers[numbers >= 0], 1):
                mine = thread == place
                text = source.text(example)
                assert tok.decode(ids[mine & ~supervised]).strip() == text["questions"][number]
                assert tok.decode(ids[mine & supervised][:-1]).strip() == text["answers"][number]
                asked.append((example, number))
    assert asked == [(e, n) for e in range(len(source)) for n in range(len(source.text(e)["questions"]))]


def test_fewer_pictures_than_places(built, tok):
    """The middle frame alone, in a batch with room for more: the other places stay empty, and so do their slots."""
    cfg = ordered(built, "middle", images=3)
    batch = next(pipeline.eval_batches(cfg, tok, split="test", image_size=32, batch_size=2))
    assert batch["images"].shape == (2, 3, 32, 32, 3)
    assert batch["images"][:, 0].any() and not batch["images"][:, 1:].any()
    assert list(batch["ids"][0, :3]) == [bpe.BOS_ID, IMAGE_ID, VOCO_ID] and batch["thread"][0, 3] == 1


def test_too_few_places_are_refused(built, tok):
    with pytest.raises(ValueError, match=r"data\.images = 4 is too small for example train-0, which has 5 pictures"):
        sources.load(built, "train").rows(tok, dataclasses.replace(built, images=4))
    short = dataclasses.replace(built, text_length=12)
    with pytest.raises(ValueError, match=r"data\.text_length = 12 is too short for question 0 of picture train-0"):
        sources.load(built, "train").rows(tok, short)


def test_one_picture_is_packed_as_ever(built, tok):
    """Naming one frame changes nothing."""
    texts = [sources.load(built, "train").text(i) for i in range(8)]
    named, silent = ([{**text, "frames": 1} for text in texts], [dict(text) for text in texts])
    for text in silent:
        del text["frames"]
    first, second = (vars(rows.question_rows(some, tok, built)) for some in (named, silent))
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])
    assert list(first["ids"][:3]) == [bpe.BOS_ID, IMAGE_ID, VOCO_ID]


def test_slots_of_a_clip(built, tok):
    """Every frame becomes a segment of its own, its visual tokens and its VoCo tokens; the text belongs to none."""
    batch = next(pipeline.eval_batches(built, tok, split="test", image_size=32, batch_size=1))
    ids = {key: batch[key] for key in ("ids", "thread", "sample", "supervised")}
    valid = np.ones((1, FRAMES, 4), bool)
    stream = jax.jit(lambda ids: layout.expand(ids, valid, voco=2, voco_count=2))(ids).stream
    for frame in range(FRAMES):
        kinds = stream.kind[0, 1 + 6 * frame :][:6].tolist()
        assert kinds == [VISION] * 4 + [VOCO] * 2
        assert stream.segment[0, 1 + 6 * frame :][:6].tolist() == [frame + 1] * 6
    assert stream.kind[0, 1 + 6 * FRAMES] == TEXT and not stream.segment[0, 1 + 6 * FRAMES :].any()
