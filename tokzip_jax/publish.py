"""A finished run small enough to pass on: its results, and of chosen stages the parameters, without optimiser state.

    python -m tokzip_jax.publish --workdir=runs/scenes --output=scenes.tar.gz --stages=base
    mkdir -p runs/scenes && tar -xzf scenes.tar.gz -C runs/scenes

What comes out is a workdir: what was trained counts as trained and what was measured as measured, and everything that
begins from one of the stages, another compressor or a sweep of methods say, goes on from there.
"""

import argparse
import json
import pathlib
import sys
import tarfile
import tempfile
from collections.abc import Sequence

from tokzip_jax import checkpoint
from tokzip_jax.workdir import Workdir, write_atomically

FILES = ("config.json", "environment.json", "tokenizer.json")
RESULTS = ("*.json", "*.md", "*.txt")  # under eval/
SUFFIX = ".tar.gz"


def publish(workdir: Workdir, output: pathlib.Path, stages: Sequence[str] = ()) -> list[str]:
    """Write a run into an archive; what stood there is replaced when the new one is whole.

    Args:
        workdir: of the run.
        output: the archive, `*.tar.gz`.
        stages: whose parameters go along. The rows of all others can be printed, and no longer measured.

    Returns:
        The names of all files in the archive, sorted.

    Raises:
        FileNotFoundError: no run, or a stage that was not trained to its end.
        ValueError: another ending than `.tar.gz`.
    """
    if not output.name.endswith(SUFFIX):
        raise ValueError(f"--output={output} must end in {SUFFIX}")
    known = set(workdir.read_config().stages)
    for stage in stages:
        if checkpoint.finished(workdir.checkpoints(stage)) is None:
            raise FileNotFoundError(
                f"stage {stage!r} has no finished checkpoint in {workdir.checkpoints(stage)}: train it to its end first"
            )
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_name(f"{output.name}.partial")
    with tempfile.TemporaryDirectory() as scratch:
        root = pathlib.Path(scratch)
        _copy(workdir.root, root, stages, known)
        names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        with tarfile.open(beside, "w:gz") as archive:
            for name in names:
                archive.add(root / name, arcname=name)
    beside.replace(output)
    return names


def _copy(source: pathlib.Path, target: pathlib.Path, stages: Sequence[str], known: set[str]) -> None:
    """What is published, file by file; `known` are the stages of the config."""
    found = [source / name for name in FILES if (source / name).exists()]
    found += [path for pattern in RESULTS for path in (source / "eval").rglob(pattern)]
    # A training without parameters and without rows is of no use: it would count as done, and could not be measured.
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in (source / "eval").rglob("rows/*.json")]
    counted = known | set(stages) | {row["origin"]["row"]["stage"] for row in rows}
    markers = (source / "checkpoints").glob(f"*/{checkpoint.FINAL}")
    found += [path for path in markers if path.parent.name in counted]
    for path in found:
        text = path.read_text(encoding="utf-8")
        if path.name == "environment.json":  # what it ran on, without the directories of whoever ran it
            entries = [{key: value for key, value in entry.items() if key != "command"} for entry in json.loads(text)]
            text = json.dumps(entries, indent=2) + "\n"
        write_atomically(target / path.relative_to(source), text)
    for stage in stages:
        place = source / "checkpoints" / stage
        step = json.loads((place / checkpoint.FINAL).read_text(encoding="utf-8"))["step"]
        params, info = checkpoint.read_params(str(place)), checkpoint.read_info(str(place))
        checkpoint.save_params(str(target / "checkpoints" / stage / str(step)), params, info=info)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="A finished run as an archive: results, and parameters of stages.")
    parser.add_argument("--workdir", required=True, help="of the run")
    parser.add_argument("--output", required=True, help=f"the archive to write, *{SUFFIX}")
    parser.add_argument("--stages", default="", help="whose parameters go along, with commas between")
    args = parser.parse_args(argv)
    try:
        output = pathlib.Path(args.output)
        names = publish(Workdir(args.workdir), output, [name for name in args.stages.split(",") if name])
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(names)} files, {output.stat().st_size / 1e6:.1f} MB, in {output}")


if __name__ == "__main__":
    main()
