"""Half-written files of killed runs."""

import fcntl

from transkd.training.leftovers import remove_leftovers


def test_only_what_nobody_writes_is_removed(tmp_path):
    run, job = tmp_path / "first", tmp_path / "sweep_1" / "0"
    stranger = tmp_path / "notes"
    for folder in (run, job, stranger):
        (folder / "checkpoints").mkdir(parents=True)
    for folder in (run, job):
        (folder / "config.yaml").touch()
    gone = [
        run / "checkpoints" / ".last.ckpt.abcd_123",
        run / ".student.safetensors.12345678",
        job / "checkpoints" / ".best.ckpt.abcdefgh",
    ]
    stays = [
        run / "checkpoints" / "last.ckpt",
        run / "checkpoints" / ".last.ckpt.abc",
        run / ".other.ckpt.abcd_123",
        stranger / "checkpoints" / ".last.ckpt.abcd_123",  # no folder of a run
    ]
    written = run / "checkpoints" / ".last.ckpt.87654321"
    for path in (*gone, *stays, written):
        path.touch()
    with written.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_leftovers(tmp_path)
        assert [path for path in gone if path.exists()] == []
        assert all(path.exists() for path in (*stays, written))
    remove_leftovers(tmp_path)
    assert not written.exists()
