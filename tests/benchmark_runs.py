"""What the tests of scripts/benchmark.py share."""

import pytest

KEYS = {"command", "date", "settings", "machine", "matmul_gflop_per_s", "rows"}
"""Of every ``--json`` file; subcommands add theirs."""


def one_line_error(run, *arguments):
    """What a run says of a mistake before it stops."""
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    text = str(caught.value)
    assert text.startswith("error: ")
    assert "\n" not in text
    return text
