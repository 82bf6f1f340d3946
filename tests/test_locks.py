"""Several processes in one workdir: pieces of work in turn, and columns that are measured once."""

import json

import pytest

from tokzip_jax import locks, sweep_columns
from tokzip_jax.config import MethodConfig, RowConfig
from tokzip_jax.workdir import Workdir


@pytest.fixture
def waits(monkeypatch):
    """How long was waited, instead of waiting."""
    found = []
    monkeypatch.setattr(locks.time, "sleep", found.append)
    return found


def test_what_another_process_holds_comes_last(tmp_path, waits):
    other = locks.hold(tmp_path, "b")  # a lock of its own, as another process has
    assert other.__enter__()
    seen = []
    for name in locks.in_turn(tmp_path, ["a", "b", "c"]):
        seen.append(name)
        with locks.hold(tmp_path, name, wait=False) as free:
            assert not free  # held while it is done
        if name == "c":
            other.__exit__(None, None, None)
    assert seen == ["a", "c", "b"] and waits == [locks.POLL]
    with locks.hold(tmp_path, "a", wait=False) as free:
        assert free
    assert list(locks.in_turn(tmp_path, [])) == []


def test_a_column_is_measured_once_and_again_where_its_row_changed(tmp_path, waits):
    workdir, path, read = Workdir(tmp_path / "run"), tmp_path / "eval" / "some.json", []
    path.parent.mkdir()
    rows = {"a": RowConfig(), "b": RowConfig(method=MethodConfig(encoder="random", tokens=1))}

    def measure(name):
        read.append(name)
        # What another process has put there meanwhile stays.
        kept = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(kept | {"other": {"value": 0, "row": {}}}))
        return {"value": len(read), "more": None}

    found = sweep_columns.measured(workdir, path, rows, measure)
    assert found == {"a": {"value": 1, "more": None}, "b": {"value": 2, "more": None}} and read == ["a", "b"]
    assert set(json.loads(path.read_text())) == {"a", "b", "other"}
    assert sweep_columns.measured(workdir, path, rows, measure) == found and len(read) == 2
    changed = rows | {"b": RowConfig(method=MethodConfig(encoder="random", tokens=2))}
    assert sweep_columns.measured(workdir, path, changed, measure)["b"] == {"value": 3, "more": None}
    assert sweep_columns.measured(workdir, path, changed, measure, again=True)["a"]["value"] == 4
    assert read == ["a", "b", "b", "a", "b"]
