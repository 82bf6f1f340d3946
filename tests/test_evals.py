"""Scores, bounds and tables."""

import collections
import dataclasses
import json

import easy_vqa
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokzip_jax.config import EvalConfig, MethodConfig, ModelConfig, RowConfig, RunConfig
from tokzip_jax.evals import retention, runner, scoring, table
from tokzip_jax.workdir import Workdir

# VoCo-LLaMA, tables 1 and 2: GQA MMB MME POPE SEED SQA-I VQAv2, and the mean retention that the paper prints.
UPPER = [61.1, 64.0, 1487.2, 85.0, 57.9, 66.5, 77.7]
LOWER = [37.7, 22.3, 617.3, 53.9, 36.9, 60.7, 41.2]
TABLE_1 = {
    "voco": ([57.0, 58.8, 1323.3, 81.4, 53.7, 65.4, 72.3], 83.7),
    "avgpool_linear": ([52.9, 55.5, 1210.3, 79.1, 50.3, 62.2, 65.0], 64.1),
    "qformer": ([51.1, 51.7, 1079.7, 77.3, 47.2, 62.7, 63.4], 57.2),
}
VOCO_EACH = [82.5, 87.5, 81.2, 88.4, 80.0, 81.0, 85.2]
UPPER_2, LOWER_2 = [64.0, 61.1, 77.7, 57.9], [22.3, 37.7, 41.2, 36.9]  # MMB GQA VQAv2 SEED
TABLE_2 = {
    128: ([61.0, 59.8, 76.9, 59.1], 97.7),
    64: ([60.5, 60.4, 75.4, 56.3], 93.7),
    32: ([59.4, 60.2, 75.3, 56.2], 92.6),
    16: ([58.6, 59.4, 75.4, 56.2], 91.3),
    8: ([58.7, 59.2, 75.3, 56.3], 91.3),
    4: ([60.4, 58.4, 74.5, 56.0], 90.4),
    2: ([60.1, 57.7, 73.5, 55.0], 87.8),
    1: ([58.8, 57.0, 72.3, 53.7], 83.8),
}


def row(method="m", accuracy=0.5, **fields):
    return table.RowResult(
        **{
            "method": method,
            "visual_tokens": 4,
            "accuracy": accuracy,
            "accuracy_by_type": {"shape": 0.25, "yes/no": 0.75},
            "accuracy_not_yes_no": 0.25,
            "kv_bytes": 524288,
            "prefill_flops": 8_400_000_000_000,
            **fields,
        }
    )


KINDS, ANSWERS = st.sampled_from(["shape", "color", "place"]), st.sampled_from(["red", "yes", " no"])


@given(st.lists(st.tuples(KINDS, ANSWERS, st.booleans()), min_size=1, max_size=40))
@settings(max_examples=40, deadline=None)
def test_tally_equals_counting_by_hand(asked):
    tally = scoring.Tally()
    tally.extend(*zip(*asked))
    score = tally.score()

    def share(keep):
        picked = [right for name, answer, right in asked if keep(name, answer)]
        return sum(picked) / len(picked) if picked else None

    assert score.questions == len(asked)
    assert score.accuracy == share(lambda name, answer: True)
    assert score.not_yes_no == share(lambda name, answer: answer == "red")
    assert score.by_type == {t: share(lambda name, answer, t=t: name == t) for t in sorted({a[0] for a in asked})}


def test_tally_refuses_what_it_cannot_score():
    with pytest.raises(ValueError, match="at least one"):
        scoring.Tally().score()
    with pytest.raises(ValueError, match="zip"):
        scoring.Tally().extend(["shape"], ["red"], [True, False])


def test_exact_match_ignores_outer_white_space_only():
    assert scoring.exact_match(" red ", "red")
    assert not scoring.exact_match("Red", "red")
    assert not scoring.exact_match("red shape", "red")


def example(*asked):
    questions, answers, types = zip(*asked)
    return {"questions": list(questions), "answers": list(answers), "types": list(types)}


def test_prior_takes_the_usual_answer_of_a_question_and_else_of_all():
    train = [example(("what?", "red", "color")), example(("what?", "blue", "color"), ("is it?", "no", "yes/no"))]
    train += [example(("what?", "blue", "color"), ("is it?", "no", "yes/no"), ("is it?", "no", "yes/no"))]
    test = [example(("what?", "blue", "color"), ("what?", "red", "color"), ("new?", "no", "yes/no"))]
    score = scoring.question_only_prior(train, test)
    assert score.by_type == {"color": 0.5, "yes/no": 1.0}
    assert score.accuracy == pytest.approx(2 / 3)


def test_prior_does_not_depend_on_the_order_of_the_examples():
    train = [example(("what?", "red", "color")), example(("what?", "blue", "color"))]
    test = [example(("what?", "red", "color"))]
    for order in (train, train[::-1]):
        assert scoring.question_only_prior(order, test).accuracy == 1.0
    with pytest.raises(ValueError, match="training examples hold no question"):
        scoring.question_only_prior([], test)


def test_prior_of_the_official_easy_vqa_split():
    def examples(questions, answers, image_ids):
        by_image = collections.defaultdict(list)
        for question, answer, image_id in zip(questions, answers, image_ids):
            by_image[image_id].append((question, answer, "yes/no" if answer in ("yes", "no") else "other"))
        return [example(*asked) for asked in by_image.values()]

    train = examples(*easy_vqa.get_train_questions())
    score = scoring.question_only_prior(train, examples(*easy_vqa.get_test_questions()))
    assert score.questions == 9673
    assert f"{100 * score.accuracy:.1f}" == "67.0"
    assert {name: f"{100 * value:.1f}" for name, value in score.by_type.items()} == {"yes/no": "82.5", "other": "23.3"}
    assert score.not_yes_no == score.by_type["other"]


@pytest.mark.parametrize("method", TABLE_1)
def test_retention_of_voco_table_1(method):
    scores, printed = TABLE_1[method]
    assert 100 * retention.mean_retention(scores, lower=LOWER, upper=UPPER) == pytest.approx(printed, abs=0.15)
    if method == "voco":
        each = [100 * retention.retention(s, lower=lo, upper=up) for s, lo, up in zip(scores, LOWER, UPPER)]
        assert each == pytest.approx(VOCO_EACH, abs=0.15)


@pytest.mark.parametrize("tokens", TABLE_2)
def test_retention_of_voco_table_2(tokens):
    scores, printed = TABLE_2[tokens]
    assert 100 * retention.mean_retention(scores, lower=LOWER_2, upper=UPPER_2) == pytest.approx(printed, abs=0.15)


def test_percent_of_full_of_visionzip():
    # VisionZip, LLaVA-1.5 7B at 192 tokens: the mean of eleven ratios is printed as 98.5 %.
    full = [61.9, 64.7, 1862, 85.9, 69.5, 78.5, 58.2, 36.3, 58.6, 31.1, 66.8]
    kept = [59.3, 63.0, 1782.6, 85.3, 68.9, 76.8, 57.3, 36.6, 56.4, 31.7, 67.7]
    ratios = [retention.percent_of_full(x, upper) for x, upper in zip(kept, full)]
    assert 100 * sum(ratios) / len(ratios) == pytest.approx(98.5, abs=0.15)


def test_a_span_under_five_points_has_no_value():
    assert retention.retention(0.6, lower=0.5, upper=0.549) is None
    assert retention.retention(0.6, lower=0.5, upper=0.4) is None
    assert retention.retention(0.5, lower=0.5, upper=0.75) == 0.0
    assert retention.percent_of_full(0.04, 0.049) is None
    assert retention.percent_of_full(0.05, 0.05) == 1.0
    assert retention.mean_retention([0.5, 0.9], lower=[0.5, 0.5], upper=[0.51, 1.0]) == pytest.approx(0.8)
    assert retention.mean_retention([0.5], lower=[0.5], upper=[0.5]) is None
    with pytest.raises(ValueError, match="2 scores need as many bounds"):
        retention.mean_retention([0.5, 0.5], lower=[0.1], upper=[0.9])


def test_what_is_drawn_for_a_picture_does_not_depend_on_its_batch(monkeypatch):
    """Every example has its own key, whatever its place and its neighbours; seeds differ."""
    monkeypatch.setattr(runner.step, "score_step", lambda *_, key, **__: jax.random.key_data(key))
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    run = runner._scorer.__wrapped__(ModelConfig(), MethodConfig(), 1, 1, mesh)

    def keys(examples, seed=0):
        batch = {"example": np.array(examples, np.int32), **dict.fromkeys(runner.MODEL_INPUTS, 0)}
        return dict(zip(examples, map(tuple, np.asarray(run({}, batch, 0, 1, jax.random.key(seed))).tolist())))

    first, second = keys([0, 1, 2, 3]), keys([3, 9, -1, 1])
    assert (first[1], first[3]) == (second[1], second[3])
    assert len({*first.values(), *second.values()}) == 6
    assert not {*first.values()} & {*keys([0, 1, 2, 3], seed=1).values()}


def test_with_bounds_fills_every_row():
    rows = [row("lower", 0.4), row("upper", 0.9), row("voco", 0.8)]
    filled = {r.method: r for r in table.with_bounds(rows, upper="upper", lower="lower")}
    assert filled["voco"].retention == pytest.approx(0.8)
    assert filled["voco"].percent_of_full == pytest.approx(8 / 9)
    assert filled["lower"].retention == 0 and filled["upper"].percent_of_full == 1
    with pytest.raises(ValueError, match="'best' is no row of the table; the rows are lower, upper, voco"):
        table.with_bounds(rows, upper="best", lower="lower")


def test_mean_over_seeds():
    other = row(accuracy=0.7, accuracy_by_type={"shape": 0.75, "yes/no": 0.65}, accuracy_not_yes_no=0.75)
    mean = table.mean_over_seeds([row(), other])
    assert (mean.accuracy, mean.accuracy_not_yes_no, mean.seeds) == (pytest.approx(0.6), pytest.approx(0.5), 2)
    assert mean.accuracy_by_type == pytest.approx({"shape": 0.5, "yes/no": 0.7})
    assert mean.spread == pytest.approx(0.1)
    assert table.mean_over_seeds([row()]) == row()
    for rows in ([], [row(), row("n")]):
        with pytest.raises(ValueError, match="seeds"):
            table.mean_over_seeds(rows)


def test_text_and_markdown_show_the_same_cells():
    rows = [row("lower", 0.4), row("upper", 0.9, note="a|b", spread=0.004)]
    rows = table.with_bounds(rows, upper="upper", lower="lower")
    rows.append(row("prior", visual_tokens=None, accuracy_by_type={"yes/no": 0.825}, kv_bytes=None, prefill_flops=None))
    text = table.text_table(rows).splitlines()
    assert text[0].split("  ")[0] == "method" and len(text) == 5
    assert len({line.index(cell) for line, cell in zip(text[2:4], ("524 kB", "524 kB"))}) == 1
    markdown = table.markdown_table(rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in markdown]
    assert cells[0][:5] == ["method", "tokens", "accuracy %", "shape", "yes/no"]
    assert cells[3] == [
        *["upper", "4", "90.0 ±0.4", "25.0", "75.0", "25.0", "100.0", "100.0", "524 kB", "8.4 TFLOP", "a\\|b"]
    ]
    assert cells[4] == ["prior", "-", "50.0", "-", "82.5", "25.0", "-", "-", "-", "-", ""]
    for line, drawn in zip(cells[2:], text[2:]):
        assert all(cell.replace("\\|", "|") in drawn for cell in line)


def test_summary_has_the_keys_that_readers_rely_on(tmp_path):
    table.write([row(), row("prior", kv_bytes=None, note="x")], tmp_path / "eval")
    read = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert [list(r) for r in read] == [
        [
            "method",
            "visual_tokens",
            "accuracy",
            "accuracy_by_type",
            "accuracy_not_yes_no",
            "percent_of_full",
            "retention",
            "kv_bytes",
            "prefill_flops",
        ]
    ] * 2
    assert read[1]["kv_bytes"] is None and read[1]["retention"] is None
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == ["summary.json", "table.md", "table.txt"]
    assert (tmp_path / "eval" / "table.md").read_text().startswith("| method |")


@pytest.mark.parametrize(
    "value, shown",
    [(None, "-"), (0, "0 B"), (999, "999 B"), (999_999, "1 MB"), (524_288, "524 kB"), (9.6e12, "9.6 TB")],
)
def test_with_unit(value, shown):
    assert table.with_unit(value, "B") == shown


def test_a_row_is_measured_again_where_something_else_is_asked(tmp_path, monkeypatch):
    """Not for a field that came to the config since, nor for what no result depends on."""
    measured = []

    def measure(self, name, wanted):
        measured.append(name)
        return row(method=name)

    monkeypatch.setattr(runner.Runner, "measure", measure)
    asked = RowConfig(method=MethodConfig(encoder="random", tokens=4, options={}), stage="base")
    cfg = RunConfig(rows={"a": asked})

    def ask(cfg=cfg, checkpoint="", **more):
        found = runner.Runner(cfg, Workdir(tmp_path), None, None, [], checkpoint).cached("a", **more)
        count, measured[:] = len(measured), []
        return found.method, count

    path = tmp_path / "eval" / "rows" / "a.json"
    assert ask() == ("a", 1) and ask() == ("a", 0) and ask(again=True) == ("a", 1)
    kept = json.loads(path.read_text())
    del kept["origin"]["row"]["method"]["voco_start"], kept["origin"]["eval"]["pictures"]
    path.write_text(json.dumps(kept))
    assert ask() == ("a", 0)
    assert ask(dataclasses.replace(cfg, eval=EvalConfig(order=("a",), pictures=1, batch_size=3)))[1] == 0
    for other in (
        dataclasses.replace(cfg, eval=EvalConfig(limit=7)),
        dataclasses.replace(cfg, rows={"a": dataclasses.replace(asked, seeds=2)}),
        dataclasses.replace(cfg, rows={"a": dataclasses.replace(asked, method=MethodConfig(encoder="uniform"))}),
    ):
        assert ask(other)[1] == ask()[1] == 1
    assert ask(checkpoint="elsewhere")[1] == 1
    kept = json.loads(path.read_text())
    kept["origin"]["row"]["gone"] = 1
    path.write_text(json.dumps(kept))
    assert ask(checkpoint="elsewhere")[1] == 1
