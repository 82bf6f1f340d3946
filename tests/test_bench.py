"""Benchmarks run at toy shapes, and what they report follows from what was measured. Nothing here measures speed."""

import itertools
import json
import types

import jax
import jax.numpy as jnp
import pytest

from tokzip_jax import llm
from tokzip_jax.bench import processes, report, step, table7, timing, visionzip, voco
from tokzip_jax.bench.__main__ import BENCHMARKS, main
from tokzip_jax.bench.weights import random_weights
from tokzip_jax.config import LlmConfig
from tokzip_jax.flops import llm_flops


def bench(capsys, *arguments):
    """The JSON line and the text of a benchmark."""
    main(arguments)
    *text, line = capsys.readouterr().out.strip().split("\n")
    return json.loads(line), "\n".join(text)


def test_cases_take_turns():
    ticks, order = itertools.count(), []
    cases = {
        "a": timing.Case(lambda: order.append("a")),
        "b": timing.Case(lambda: order.append("b"), repeats=2),
    }
    seconds = timing.interleave(cases, runs=3, warmup=1, clock=lambda: next(ticks) ** 2)
    assert order == ["a", "b", "b"] * 4
    # The clock shows squares. Read twice in the warm-up, it is read at 2 + 4n, 3 + 4n for a and 4 + 4n, 5 + 4n for b.
    assert seconds["a"] == [2 * (2 + 4 * n) + 1 for n in range(3)]
    assert seconds["b"] == [(2 * (4 + 4 * n) + 1) / 2 for n in range(3)]
    with pytest.raises(ValueError, match="runs = 0 must be at least 1"):
        timing.interleave(cases, runs=0)


def test_ratios_pair_the_rounds():
    seconds = {"a": [2.0, 9.0, 20.0, 3.0, 4.0], "b": [1.0, 3.0, 10.0, 2.0, 1.0]}
    row = timing.ratio(seconds, "a", "b")
    assert row == {
        "what": "a / b",
        "median": 2.0,
        "quartile_low": 2.0,
        "quartile_high": 3.0,
        "min": 1.5,
        "max": 4.0,
        "best": 2.0,
    }
    once = timing.spread([5.0])
    assert set(once.values()) == {5.0}


def test_report_is_json_and_lines_up():
    rows = [{"what": "short", "n": 12345}, {"what": "a longer one", "n": 0.25}]
    made = report.Report("demo", {"shape": {"width": 2048}}, {"table": rows}, ["One sentence."])
    found = json.loads(json.dumps(made.asdict()))
    assert found["tables"]["table"] == rows
    assert set(found["ran_on"]) >= {"device", "cores", "load average over one minute", "versions", "time"}
    lines = made.text().split("\n")
    assert lines[1] == "  shape: width 2,048"
    start = lines.index("table")
    assert lines[start + 1 : start + 4] == [
        "  what               n",
        "  short         12,345",
        "  a longer one    0.25",
    ]
    assert lines[-1] == "One sentence."


def test_weights_are_of_the_shapes_and_ordinary():
    cfg = voco.TINY
    shapes = jax.eval_shape(lambda key: llm.init(cfg, key, jnp.bfloat16), jax.random.key(0))
    made = random_weights(shapes)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), shapes
    )
    assert jnp.all(made["norm"]["scale"] == 1)
    assert 0.015 < jnp.std(made["embed"]["table"].astype(jnp.float32)) < 0.025


def test_visionzip(capsys, tmp_path):
    file = tmp_path / "found.json"
    arguments = ("visionzip", "--tiny", "--tokens=4", "--contextual=1", "--runs=2", "--repeats=2", f"--json={file}")
    found, text = bench(capsys, *arguments)
    assert json.loads(file.read_text()) == found
    assert found["settings"]["blocks run"] == 2 and "blocks run: 2" in text
    times, ratios, sizes = found["tables"].values()
    assert [row["what"] for row in times] == ["encoder", "encoder + VisionZip", "VisionZip"]
    assert [row["what"] for row in ratios] == ["VisionZip / encoder", "encoder + VisionZip / encoder"]
    assert ratios[0]["best"] == pytest.approx(times[2]["min"] / times[0]["min"])
    encoder, both, difference, needed = sizes
    for column in ("temporaries", "results", "together"):
        assert difference[column] == both[column] - encoder[column]
    # 16 scores; 17 key rows of 8 (one head's width); 4 tokens of 16. All float32.
    assert (needed["temporaries"], needed["results"]) == (4 * (16 + 17 * 8), 4 * 4 * 16)


def test_voco(capsys, monkeypatch):
    made = {}

    def interleave(cases, **settings):
        made.update({name: case.function() for name, case in cases.items()})
        return timing.interleave(cases, **settings)

    monkeypatch.setattr(voco, "interleave", interleave)
    arguments = ("--tiny", "--batch=2", "--visual=8", "--text=4", "--voco=2", "--decode=3", "--runs=2", "--clock=cpu")
    found, _ = bench(capsys, "voco", *arguments)
    times, scans, ratios, rates, _ = found["tables"].values()
    assert [row["what"] for row in times] == ["full prefill", "stage two", "full prefill, scan", "stage two, scan"]
    assert [row["what"] for row in scans] == ["full prefill, scan / full prefill", "stage two, scan / stage two"]
    assert [row["what"] for row in rates] == ["unstacked blocks", "scan over the stack"]
    for row, causal in zip(ratios, (False, True), strict=True):
        assert row["full"] == llm_flops(voco.TINY, 12, causal=causal)
        assert row["stage two"] == llm_flops(voco.TINY, 4, past=2, causal=causal)
        assert row["FLOP / time"] == pytest.approx(row["full"] / row["stage two"] / row["time ratio"])
    # What was timed: the last position's logits, the whole prompt in the cache, and the same with and without a scan.
    for name, slots, last in (("full prefill", 12, 11), ("stage two", 6, 13)):
        prompt, scanned = made[name], made[f"{name}, scan"]
        assert prompt.logits_BV.shape == (2, 32) and prompt.stages[0].last.position.tolist() == [[last], [last]]
        assert prompt.stages[0].cache.stream.kind.shape == (2, slots)
        assert jnp.allclose(prompt.logits_BV, scanned.logits_BV, atol=1e-5)
    assert made["unstacked blocks"].tolist() == made["scan over the stack"].tolist()


def test_attention(capsys):
    """Rows of 1 + 16 + 1 + 16 tokens are one block."""
    found, text = bench(capsys, "attention", "--tiny", "--runs", "1")
    assert found["settings"]["rows"] == [1, 1, 34, 4]
    voco, visible = sorted(found["tables"]["what there is to see"], key=lambda row: row["pairs seen"])
    assert (voco["mask"], visible["mask"]) == ("voco", "visible")
    assert voco["blocks computed"] == visible["blocks computed"] == 1.0
    # BOS and picture 17 * 18 / 2, the VoCo token 18; text sees it, and its own question: 15 * 16 / 2 and 1.
    assert voco["pairs seen"] == pytest.approx((153 + 18 + 16 + 120 + 1) / 34**2)
    assert len(found["tables"]["seconds"]) == 12 and len(found["tables"]["other / blocks"]) == 8
    assert "forward, voco, xla / forward, voco, blocks" in text


def test_step(capsys):
    options = ("--tiny", "--grid=6", "--text=30", "--voco=2", "--layers=1", "--rank=2", "--runs=2", "--clock=cpu")
    found, text = bench(capsys, "step", *options)
    flops, times, ratios, low_rank, memory = found["tables"].values()
    student, whole, frozen, one, joint, lora, lora_one, both = (row["FLOPs"] for row in flops)
    names = [step.STUDENT, step.WHOLE, step.FROZEN, step.ONE_PASS, step.JOINT, step.LORA, step.LORA_ONE_PASS]
    assert [row["what"] for row in flops] == [*names, step.BOTH]
    assert both == student + whole
    # 32 ids, of which one becomes 36 patches and one 2 VoCo tokens, or for the plain model an unused slot.
    assert flops[3]["expected"] == pytest.approx((3 * 68 + 32) / (3 * 68))
    assert flops[4]["expected to be saved"] == pytest.approx(1 - (68 + 32) / (68 + 67))
    assert flops[5]["expected"] == pytest.approx(2 / 3)
    assert flops[6]["expected"] == pytest.approx((2 * 68 + 32) / (3 * 68))
    assert lora < student < one < frozen < joint < both and lora < lora_one < one
    assert flops[3]["saved by one pass"] == 1 - one / frozen and flops[2]["saved by one pass"] == 0
    assert [row["what"] for row in times[:7]] == [row["what"] for row in memory] == names
    assert low_rank[0]["best"] == pytest.approx(times[5]["min"] / times[0]["min"])
    assert ratios[0]["best"] == pytest.approx(times[3]["min"] / times[2]["min"])
    for row in memory:
        assert row["peak"] == pytest.approx(row["arguments"] + row["results"] + row["temporaries"])
    # A frozen teacher's weights come in beside the student's; gradients of low-rank deltas alone are small.
    assert memory[2]["arguments"] > memory[0]["arguments"] and memory[5]["results"] < memory[0]["results"]
    assert all(row["temporaries"] > 0 for row in memory) and "attention's dependence" in text


def test_import_adds_up_packages(capsys):
    log = """import time: self [us] | cumulative | imported package
import time:       100 |        100 |   _io
import time:    200000 |     200000 |     jax.core
import time:    300000 |     500100 |   jax
import time:      1000 |     501100 | tokzip_jax
"""
    assert processes.slowest(log, 2) == [("jax", 0.5), ("tokzip_jax", 0.001)]
    found, _ = bench(capsys, "import", "--modules", "json", "--runs=1")
    times, own = found["tables"].values()
    assert [row["what"] for row in times] == ["nothing", "import json"]
    assert "json" in [row["package"] for row in own]


def test_startup_times_both_starts(monkeypatch, capsys):
    caches, now, took = [], [0.0], iter([4.0, 1.0, 6.0, 2.0])

    def first_step(args, workdir, cache):
        caches.append(cache)
        assert not workdir.exists()
        cache.mkdir(exist_ok=True)
        (cache / workdir.name).touch()
        now[0] += next(took)

    monkeypatch.setattr(processes, "first_step", first_step)
    monkeypatch.setitem(processes.CLOCKS, "wall", lambda: now[0])
    found, _ = bench(capsys, "startup", "--runs=2")
    times, ratios = found["tables"].values()
    assert [row["median"] for row in times] == [5.0, 1.5]
    assert (ratios[0]["median"], ratios[0]["best"]) == (3.5, 4.0)
    # The second start of a round finds the cache of the first; a new round begins with an empty one.
    assert caches[0] == caches[1] != caches[2] == caches[3]
    assert found["settings"]["files in the cache"] == [2, 2]


def test_first_step_is_a_whole_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert not processes.has_step(path)
    path.write_text('{"stage": "base", "step": 1')
    assert not processes.has_step(path)
    path.write_text('{"stage": "base", "step": 1}\n')
    assert processes.has_step(path)


@pytest.mark.slow
def test_startup_says_why_a_training_ended(tmp_path):
    args = types.SimpleNamespace(config="configs/none.py", data_dir="")
    with pytest.raises(RuntimeError, match=r"(?s)ended before its first step.*configs/none\.py"):
        processes.first_step(args, tmp_path / "run", tmp_path / "cache")


def test_table7(capsys):
    found, text = bench(capsys, "table7", "--text=64")
    assert found["settings"]["cache bytes of one VoCo token"] == 524_288
    assert found["settings"]["parameters"] == 6_738_415_616
    (rows,) = found["tables"].values()
    column = "TFLOPs at 64 text tokens"
    assert [row["printed TFLOPs"] for row in rows] == pytest.approx([9.6, 1.2, 0.5])
    for row, (new, past) in zip(rows, ((576, 0), (0, 576), (0, 1)), strict=True):
        assert row[column] == pytest.approx(llm_flops(LlmConfig(), new + 64, past=past) / 1e12)
    assert "No single text length gives all three printed figures" in text


def test_bad_options_end_in_one_sentence(capsys):
    with pytest.raises(SystemExit, match="error: visionzip: 4 contextual of 4 tokens"):
        main(["visionzip", "--tiny", "--tokens=4", "--contextual=4"])
    with pytest.raises(SystemExit, match="error: runs = 0 must be at least 1"):
        main(["import", "--runs=0"])
    with pytest.raises(SystemExit):
        main(["nothing"])
    said = capsys.readouterr().err
    assert all(name in said for name in BENCHMARKS)
    named = {"visionzip", "compress", "voco", "decoder", "attention", "step", "import", "startup", "table7"}
    assert named == set(BENCHMARKS)
    assert visionzip.VitConfig().patches == 576 and table7.LlmConfig().layers == 32
