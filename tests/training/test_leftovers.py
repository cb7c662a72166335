"""Half-written files of killed runs."""

import fcntl

from transkd.training.leftovers import remove_leftovers, runs_of


def test_only_what_nobody_writes_is_removed(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    names = ["checkpoints/.last.ckpt.abcd_123", "checkpoints/.best.ckpt.abcdefgh", ".student.safetensors.12345678"]
    gone = [tmp_path / name for name in (*names, ".not_finite_rank1.pt.abcdefgh", ".config.yaml.abcdefgh")]
    stays = [tmp_path / name for name in ("checkpoints/last.ckpt", "checkpoints/.last.ckpt.abc", ".other.abcd_123")]
    written = tmp_path / "checkpoints" / ".last.ckpt.87654321"
    for path in (*gone, *stays, written):
        path.touch()
    with written.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_leftovers(tmp_path)
        assert [path for path in gone if path.exists()] == []
        assert all(path.exists() for path in (*stays, written))
    remove_leftovers(tmp_path)
    assert not written.exists()


def test_runs_and_jobs_of_sweeps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("outputs/demo/first", "outputs/demo/sweep_1/0", "outputs/other/first", "demo/first"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.yaml").touch()
    (tmp_path / "outputs/demo/teachers").mkdir()
    assert sorted(map(str, runs_of("demo"))) == ["outputs/demo/first", "outputs/demo/sweep_1/0"]
