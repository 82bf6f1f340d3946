"""`python -m tokzip_jax.bench NAME [options]`: run a benchmark, print its tables, write JSON.

    python -m tokzip_jax.bench visionzip            # VisionZip beside the CLIP-L/14-336 tower, about a minute
    python -m tokzip_jax.bench voco                 # VoCo's stage two beside a full prefill, about a minute
    python -m tokzip_jax.bench compress             # every encoder-site method beside that tower
    python -m tokzip_jax.bench decoder              # prefill with a decoder-site method, time beside FLOPs
    python -m tokzip_jax.bench attention            # explicit products, JAX's own and blocks
    python -m tokzip_jax.bench step                 # a training step without, with a teacher of its own or in one pass
    python -m tokzip_jax.bench import               # import time in fresh processes
    python -m tokzip_jax.bench startup              # first and second start of a small training
    python -m tokzip_jax.bench table7               # cache bytes and FLOPs at 7B, on paper

Cases are run in turn (A B A B) after a warm-up; given are medians, quartiles and extremes, and the last line is all of
it as JSON. `--tiny` takes toy shapes, to see that a benchmark runs. On a machine that does other things as well, the
"load average" line says how much to trust.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

from tokzip_jax.bench import attention, compress, decoder, processes, step, table7, visionzip, voco

# Name: (options, benchmark, runs unless told otherwise).
BENCHMARKS = {
    "visionzip": (visionzip.add_arguments, visionzip.run, 7),
    "compress": (compress.add_arguments, compress.run, 5),
    "voco": (voco.add_arguments, voco.run, 9),
    "decoder": (decoder.add_arguments, decoder.run, 7),
    "attention": (attention.add_arguments, attention.run, 9),
    "step": (step.add_arguments, step.run, 5),
    "import": (processes.add_import_arguments, processes.run_import, 5),
    "startup": (processes.add_startup_arguments, processes.run_startup, 1),
    "table7": (table7.add_arguments, table7.run, 1),
}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; `argv` without the program's name."""
    parser = argparse.ArgumentParser(prog="python -m tokzip_jax.bench", description=__doc__.split("\n")[0])
    names = parser.add_subparsers(dest="name", required=True)
    for name, (add_arguments, run, runs) in BENCHMARKS.items():
        one = names.add_parser(name, help=run.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        one.add_argument("--runs", type=int, default=runs, help="measured rounds")
        one.add_argument("--dtype", default="float32", help="of weights and activations")
        one.add_argument("--tiny", action="store_true", help="toy shapes")
        one.add_argument("--json", type=pathlib.Path, help="also write the numbers to this file")
        add_arguments(one)
    args = parser.parse_args(argv)
    try:
        report = BENCHMARKS[args.name][1](args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(report.text(), flush=True)
    print(json.dumps(report.asdict()), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(report.asdict(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
