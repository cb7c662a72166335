"""Sweeps made by hand, means and deviations worked out by hand."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "sweep_table.py"


def add_job(root, number, overrides, miou=None, teacher=None, protocol="full-res", about=None):
    folder = root / str(number)
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {line}\n" for line in overrides))
    if miou is not None:
        seed = next((int(line.removeprefix("seed=")) for line in overrides if line.startswith("seed=")), 0)
        scores = {"mIoU": miou, "protocol": protocol}
        scores |= {} if about is None else {"protocol_description": about}
        results = {**scores, "seed": seed, "teacher": {} if teacher is None else {"mIoU": teacher}}
        (folder / "results.json").write_text(json.dumps(results))


def table(*arguments, columns=160):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env={"COLUMNS": str(columns), "PYTHONIOENCODING": "utf-8"}
    )


def markdown_rows(*arguments):
    run = table(*arguments, "--markdown")
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture
def sweep(tmp_path):
    root = tmp_path / "sweep"
    for seed, miou in enumerate((0.50, 0.52, 0.57)):
        add_job(root, seed, ["distill=none", f"seed={seed}", "+experiment=acdc"], miou)
    for seed, miou in enumerate((0.60, 0.62)):
        add_job(root, seed + 3, ["distill=transkd_base", f"seed={seed}", "+experiment=acdc"], miou, teacher=0.6934)
    return root


def test_mean_and_sample_deviation(sweep):
    # none: mean 53; deviations -3, -1, 4; (9 + 1 + 16) / 2 = 13; sqrt 13 = 3.6056
    # transkd_base: mean 61; deviations -1, 1; 2 / 1 = 2; sqrt 2 = 1.4142
    assert markdown_rows(sweep) == [
        ["distill", "mIoU", "seeds", "teacher", "protocol"],
        ["---"] * 5,
        ["none", "53.00 ± 3.61", "3", "–", "full-res"],
        ["transkd_base", "61.00 ± 1.41", "2", "69.34", "full-res"],
    ]


def test_terminal_table(sweep):
    run = table(sweep)
    assert run.returncode == 0
    for cell in ("distill", "transkd_base", "53.00 ± 3.61", "61.00 ± 1.41", "69.34", "over seed"):
        assert cell in run.stdout


def test_names_of_settings_are_whole_on_a_narrow_terminal(tmp_path):
    for number, (first, second) in enumerate([("1", "3"), ("2", "4")]):
        add_job(tmp_path, number, [f"student.network.encoder.a={first}", f"student.network.encoder.b={second}"], 0.5)
    lines = [line.split("┃")[1:-1] for line in table(tmp_path, columns=70).stdout.splitlines() if line.startswith("┃")]
    header = ["".join(part.strip() for part in column) for column in zip(*lines, strict=True)]
    assert header[:2] == ["student.network.encoder.a", "student.network.encoder.b"]


def test_csv_holds_unrounded_numbers(sweep, tmp_path):
    path = tmp_path / "table.csv"
    assert table(sweep, "--csv", path).returncode == 0
    rows = list(csv.DictReader(path.open(newline="")))
    assert [row["distill"] for row in rows] == ["none", "transkd_base"]
    assert float(rows[0]["miou"]) == pytest.approx(53)
    assert float(rows[0]["std"]) == pytest.approx(13**0.5)
    assert (rows[0]["runs"], rows[0]["teacher"], rows[0]["protocol"]) == ("3", "", "full-res")
    assert float(rows[1]["teacher"]) == pytest.approx(69.34)


def test_one_seed_has_no_deviation(tmp_path):
    add_job(tmp_path, 0, ["distill=none"], 0.5)
    add_job(tmp_path, 1, ["distill=transkd_ea"], 0.51)
    assert [row[1:3] for row in markdown_rows(tmp_path)[2:]] == [["50.00 ± –", "1"], ["51.00 ± –", "1"]]


def test_nothing_varies_but_the_seed(tmp_path):
    for seed, miou in enumerate((0.4, 0.6)):
        add_job(tmp_path, seed, [f"seed={seed}", "+experiment=demo"], miou)
    assert markdown_rows(tmp_path)[2:] == [["50.00 ± 14.14", "2", "–", "full-res"]]


def test_every_varying_setting_makes_rows_unless_group_says_otherwise(tmp_path):
    jobs = [("none", "1e-4", 0.4), ("none", "1e-3", 0.5), ("transkd_ea", "1e-4", 0.6), ("transkd_ea", "1e-3", 0.8)]
    for number, (distill, rate, miou) in enumerate(jobs):
        add_job(tmp_path, number, [f"distill={distill}", f"optim.optimizer.lr={rate}", "seed=0"], miou)
    assert [row[:4] for row in markdown_rows(tmp_path)[2:]] == [
        [distill, rate, f"{100 * miou:.2f} ± –", "1"] for distill, rate, miou in jobs
    ]
    # none: 45 ± sqrt(2 · 25 / 1) = 7.07; transkd_ea: 70 ± sqrt(2 · 100 / 1) = 14.14
    grouped = markdown_rows(tmp_path, "--group", "distill")
    assert grouped[0] == ["distill", "mIoU", "runs", "teacher", "protocol"]  # not seeds: the rate varies too
    assert [row[:3] for row in grouped[2:]] == [["none", "45.00 ± 7.07", "2"], ["transkd_ea", "70.00 ± 14.14", "2"]]
    assert "over seed, optim.optimizer.lr" in table(tmp_path, "--group", "distill", "--markdown").stdout


def test_teachers_that_differ_are_averaged_too(tmp_path):
    for seed, teacher in enumerate((0.7, 0.72)):
        add_job(tmp_path, seed, ["distill=transkd_ea", f"seed={seed}"], 0.5, teacher=teacher)
    assert markdown_rows(tmp_path)[2][2] == "71.00 ± 1.41"


def test_jobs_stand_in_the_order_of_their_numbers(tmp_path):
    for number in range(11):
        add_job(tmp_path, number, [f"optim.optimizer.lr={number}"], 0.5)
    assert [row[0] for row in markdown_rows(tmp_path)[2:]] == [str(number) for number in range(11)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no results.json: it failed or is not finished"),
        ('{"mIoU": 0.', "results.json is damaged"),
        ('{"seed": 0}', "results.json has no 'mIoU'"),
        ('{"mIoU": NaN, "seed": 2, "protocol": "full-res"}', "its mIoU is nan"),
    ],
)
def test_a_job_without_usable_results_is_named(sweep, content, said):
    add_job(sweep, 5, ["distill=transkd_base", "seed=2", "+experiment=acdc"])
    if content is not None:
        (sweep / "5" / "results.json").write_text(content)
    run = table(sweep, "--markdown")
    assert run.returncode == 0
    assert f"left out: job 5 (distill=transkd_base seed=2 experiment=acdc): {said}" in run.stderr
    assert "61.00 ± 1.41 | 2 |" in run.stdout


def test_a_failed_job_is_shown_with_its_line(sweep):
    add_job(sweep, 5, ["distill=transkd_base", "seed=-1"])
    (sweep / "5" / "error.txt").write_text("seed=-1: expected a whole number\n\nmore\n")
    assert "left out: job 5 (distill=transkd_base seed=-1): seed=-1: expected a whole number\n" in table(sweep).stderr


def test_mixed_protocols_are_an_error(sweep):
    add_job(sweep, 5, ["distill=transkd_base", "seed=2"], 0.6, protocol="transkd-paper")
    assert_one_line_error(table(sweep), "full-res (job 4), transkd-paper (job 5)")


def test_one_protocol_with_mixed_settings_is_an_error(tmp_path):
    for number, window in enumerate((512, 768)):
        add_job(tmp_path, number, [f"seed={number}"], 0.6, protocol="slide", about=f"windows of {window}")
    assert_one_line_error(table(tmp_path), "slide: windows of 512 (job 0), slide: windows of 768 (job 1)")


def test_curves_of_mixed_protocols_are_an_error(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import compare_curves

    for number, protocol in enumerate(("full-res", "slide")):
        add_job(tmp_path, number, [], 0.6, protocol=protocol)
    with pytest.raises(SystemExit, match=r"not comparable: full-res \(.*/0\), slide \(.*/1\)"):
        compare_curves.draw([tmp_path / "0", tmp_path / "1"], ["a", "b"], tmp_path / "curves.png")


def test_no_jobs_no_folder_no_results_unknown_setting(tmp_path, sweep):
    (tmp_path / "empty").mkdir()
    assert_one_line_error(table(tmp_path / "empty"), "no jobs in")
    assert_one_line_error(table(tmp_path / "absent"), "no such folder")
    assert_one_line_error(table(sweep, "--group", "distil"), "no job sets it; available: distill, seed, experiment")
    add_job(tmp_path / "failed", 0, ["seed=0"])
    run = table(tmp_path / "failed")
    assert run.returncode != 0
    assert run.stderr.splitlines()[-1].startswith("error: no job in")


def assert_one_line_error(run, text):
    assert run.returncode != 0
    assert run.stdout == ""
    assert len(run.stderr.splitlines()) == 1
    assert run.stderr.startswith("error: ")
    assert text in run.stderr
