"""Benchmark transkd against alternatives with the same weights, in one process, interleaved.

python scripts/benchmark.py forward --network segformer_b0 --size 512 1024 --against transformers smp drawn-out
python scripts/benchmark.py inference --against transformers onnxruntime openvino
python scripts/benchmark.py step --teacher segformer_b2 --student segformer_b0 --against drawn-out
python scripts/benchmark.py train --steps 8
python scripts/benchmark.py loader --workers 0 1 2
python scripts/benchmark.py terms
python scripts/benchmark.py score

After a warm-up the alternatives are timed in turns (A B C A B C …), so that other load on the machine affects all of
them equally; medians are compared. Their outputs are compared first, and nothing is timed if they differ.
``drawn-out`` is a reference implementation without the optimisations of transkd. ``--json FILE`` writes all timings:
``command``, ``date``, ``settings``, ``machine``, ``matmul_gflop_per_s`` and ``rows``, one per alternative.
"""

import argparse
import sys
from collections.abc import Sequence

from benchmarks import forward, inference, loader, score, step, terms, train

from transkd.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, report."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    subparsers = parser.add_subparsers(required=True, metavar="WHAT")
    for command in (forward, inference, step, train, loader, terms, score):
        command.add(subparsers)
    args = parser.parse_args(arguments)
    args.command_line = arguments
    try:
        args.measure(args)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
