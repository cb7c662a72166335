"""The commands as a user calls them: what they answer to a mistake."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from io import BytesIO
from unittest import mock

import numpy as np
import pytest
import torch
from hydra.errors import MissingConfigException
from PIL import Image
from runs import TINY, composed, results

from transkd import evaluate, predict, replay, train
from transkd.models import create_segmenter, save_segmenter
from transkd.run import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with one finished run of a student alone."""
    root = tmp_path_factory.mktemp("commands")
    run(composed(root, "run", "distill=none", "trainer.max_epochs=1"))
    return root


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Call a command's main in a folder of its own; gives the error message, or None where it succeeds."""

    def call(module, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        monkeypatch.setattr(sys, "argv", ["transkd", *map(str, arguments)])
        try:
            module.main()
        except SystemExit as stop:
            return str(stop.code)
        return None

    return call


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["distill=nope"], ["distill/nope", "transkd_base", "transkd_ea", "none"]),
        (["term=[csf,nope]"], ["term/nope", "csf", "pea", "ea", "gl_mixer"]),
        (["+experiment=nope"], ["experiment/nope", "acdc", "camvid", "demo"]),
        (["student=nope"], ["student/nope", "segformer_b0"]),
        (["trainer.max_epoch=3"], ["trainer.max_epoch", "did you mean max_epochs?", "precision"]),
        (["-m", "hydra/sweeper=optuna", "seed=0,1"], ["hydra/sweeper/optuna", "basic; more come with Hydra's plugins"]),
        (["-cn", "evaluate"], ["--config-name evaluate: expected train", "python -m transkd.evaluate"]),
        (["sed=3"], ["sed", "did you mean seed?", "protocol"]),
        (["criterion.terms.csf.wieght=3"], ["wieght", "did you mean weight?"]),
        (["+experiment=acdc"], ["data.root"]),
        (["+experiment=acdc", "data.root=nowhere"], ["data.root=nowhere", "rgb_anon/", "+experiment=demo"]),
        (["+experiment=camvid", "data.root=nowhere"], ["data.root=nowhere", "trainannot", "+experiment=demo"]),
        (["protocol=half-res"], ["'half-res'", "full-res", "transkd-paper"]),
        (["data.num_classes=18"], ["data.num_classes=18", "19 classes"]),
        (["student.weights=nowhere.pth"], ["weights file not found: nowhere.pth"]),
        (["criterion.terms.csf.weight=-1"], ["csf", "weight"]),
        (["criterion.terms.csf.term.mid_channel=3"], ["mid_channel"]),
        (
            ["criterion.terms.csf.term._target_=transkd.losses.CSFLos"],
            ["criterion.terms.csf.term", "transkd.losses has no CSFLos", "did you mean CSFLoss?", "KDLoss"],
        ),
        (["student.network._target_=transkd.model.x"], ["student.network", "no module transkd.model"]),
        (["criterion.terms.csf.term.temperature=nan"], ["temperature", "nan"]),
        (["criterion.terms.csf.term.criterion=nope"], ["nope", "hierarchical_context", "channel_kl"]),
    ],
)
def test_a_mistake_gets_one_clear_message(call, arguments, parts):
    message = call(train, *arguments)
    assert message is not None
    assert message.startswith("error: ")
    assert "\n" not in message
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize("name", ["nowhere", "nowhere.inside", "transkd.nowhere"])
def test_a_plugin_that_is_not_there(call, name):
    error = call(train, f"plugins=[{name}]")
    assert error.startswith(f"error: plugins=[{name}]: there is no module")
    assert "\n" not in error


def test_a_plugin_that_lacks_something_is_named_with_its_line(call, tmp_path, monkeypatch):
    (tmp_path / "half.py").write_text("\nimport nowhere_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = call(train, "plugins=[half]")
    assert f"{tmp_path / 'half.py'}, line 2: ModuleNotFoundError: No module named 'nowhere_at_all'" in message
    assert "\n" not in message


def test_a_fault_of_ours_says_so_and_leaves_a_report(call, tmp_path, monkeypatch):
    monkeypatch.setattr("transkd.run.keep_compiled_code", [].index)  # raises where run.py calls it
    message = call(train, "hydra.run.dir=run", "seed=7")
    assert message.startswith("error: a fault of transkd, not of yours: ValueError: ")
    assert " is not in list, run.py line " in message
    assert message.endswith(f"Please report it in the issue tracker of the repository that you have transkd from, with "
                            f"the file {tmp_path / 'run' / 'error.txt'}")  # fmt: skip
    report = (tmp_path / "run" / "error.txt").read_text()
    for part in ("Traceback (most recent call last)", "run.py", "seed: 7", f"torch: {version('torch')}", "command: "):
        assert part in report


def test_full_errors_keep_their_traceback(call, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["transkd", "distill=nope"])
    with pytest.raises(MissingConfigException):
        train.main()
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def test_a_checkpoint_of_another_architecture(call, trained):
    message = call(train, *TINY, f"data.root={trained / 'data'}", "student=segformer_b1", "distill=none",
                   f"student.weights={trained / 'run' / 'student.safetensors'}")  # fmt: skip
    assert "does not fit segformer_b1 with 19 classes" in message
    assert "encoder.patch_embed1.proj.weight: expected [64, 3, 7, 7], got [32, 3, 7, 7]" in message


class Bomb:
    """Unpickled, it would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.fixture
def bad_weights(trained, tmp_path):
    """Files of weights that no command may accept, by what is wrong with them."""
    whole = (trained / "run" / "student.safetensors").read_bytes()
    torch.save({"weight": torch.zeros(1), "more": Bomb()}, tmp_path / "pickle.pth")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save({"layer1.0.conv1.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "resnet.pth")
    save_segmenter(create_segmenter("segformer_b0", num_classes=7), tmp_path / "seven.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ("pickle.pth", ["is not a readable weights file", "never executed"]),
        ("empty.pth", ["is not a readable weights file", "0 bytes"]),
        ("truncated.safetensors", ["damaged safetensors", "copy or download it again"]),
        ("resnet.pth", ["encoder.patch_embed1.proj.weight: missing", "looks like a ResNet"]),
        ("seven.safetensors", ["has 7 classes", "student.classifier=new"]),
        ("hf://somebody/segformer", ["cannot fetch", "--local-dir FOLDER"]),
        ("timm://mit_b0", ["the hub has no weights of timm's 'mit_b0'"]),
    ],
)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_bad_weights(call, trained, bad_weights, monkeypatch, who, weights, parts):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = call(
        train, *TINY, f"data.root={trained / 'data'}", f"{who}.weights={weights}", "distill=transkd_base",
        "hydra.run.dir=run",
    )  # fmt: skip
    assert message is not None
    assert message.startswith("error: ")
    assert "\n" not in message
    assert [part for part in (weights, *parts) if part not in message] == []
    assert not (bad_weights / "executed").exists()
    assert not (bad_weights / "run" / "checkpoints").exists()


def test_a_tap_with_a_typo(call, trained):
    module = "{_target_:torchvision.models.segmentation.lraspp_mobilenet_v3_large,weights:null,weights_backbone:null}"
    where = [*TINY, f"data.root={trained / 'data'}", "teacher=module", f"teacher.network.module={module}"]
    message = call(train, *where, "teacher.network.features=[backbon.3]", "distill=none", "term=[csf]")
    assert message.startswith("error: ")
    assert "no submodule 'backbon.3' to tap" in message
    assert "backbone.3" in message


def test_evaluate_weights_that_do_not_say_what_they_are(call, trained, bad_weights):
    where = [*TINY, f"data.root={trained / 'data'}", "hydra.run.dir=scored"]
    message = call(evaluate, *where, "weights=resnet.pth")
    assert "does not fit segformer_b0 with 19 classes" in message
    assert "looks like a ResNet" in message


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_stops_the_training(call, trained, tmp_path, workers):
    shutil.copytree(trained / "data", tmp_path / "data")
    broken = next((tmp_path / "data" / "rgb_anon" / "fog" / "train").rglob("*.png"))
    broken.write_bytes(broken.read_bytes()[:300])
    message = call(train, *TINY, f"data.root={tmp_path / 'data'}", "distill=none", f"data.num_workers={workers}")
    assert message.startswith("error: cannot read the image")
    assert broken.name in message
    assert "\n" not in message


def test_a_batch_of_unlike_sizes(call, trained):
    scaled = "[{_target_:albumentations.RandomScale,scale_limit:[0.1,1],p:1}]"
    where = [f"data.root={trained / 'data'}", "distill=none"]
    message = call(train, *TINY, *where, f"data.train_transform.transforms={scaled}")
    assert "must have the same size" in message
    assert "data.batch_size=1" in message


def test_sweep(call, trained, tmp_path):
    short = ["trainer.max_epochs=1", "trainer.limit_train_batches=1", "distill=none", f"data.root={trained / 'data'}"]
    assert call(train, "-m", *TINY, *short, "seed=0,1", "hydra.sweep.dir=sweep") is None
    for job in (0, 1):
        assert results(tmp_path / "sweep", str(job))["seed"] == job


def test_a_failed_job_does_not_end_a_sweep(call, trained, tmp_path, capsys):
    short = ["trainer.max_epochs=1", "trainer.limit_train_batches=1", "distill=none", f"data.root={trained / 'data'}"]
    message = call(train, "-m", *TINY, *short, "seed=-1,2", "hydra.sweep.dir=sweep")
    assert message == "error: 1 of the sweep's jobs failed: job 0 (seed=-1)"
    shown = capsys.readouterr().err
    assert "error: job 0 (seed=-1): seed=-1: expected a whole number of at least 0\n" in shown
    assert "Error executing job" not in shown
    assert (tmp_path / "sweep" / "0" / "error.txt").read_text() == "seed=-1: expected a whole number of at least 0\n"
    assert results(tmp_path / "sweep", "1")["seed"] == 2
    again = call(train, "-m", *TINY, *short, "seed=1,2", "hydra.sweep.dir=sweep")
    assert again.startswith("error: sweep holds a run already")
    assert "hydra.sweep.dir=FOLDER" in again


def test_a_name_that_does_not_exist_ends_a_sweep_before_it_begins(call, tmp_path):
    message = call(train, "-m", "distill=none,nope", "hydra.sweep.dir=sweep")
    assert message.startswith("error: unknown distill distill/nope; there are: at, ")
    assert not (tmp_path / "sweep" / "0").exists()


def test_a_run_is_not_written_over(call, trained):
    where = [*TINY, f"data.root={trained / 'data'}", "distill=none", f"hydra.run.dir={trained / 'run'}"]
    before = (trained / "run" / "results.json").read_bytes()
    for module, more in ((train, []), (evaluate, [f"weights={trained / 'run' / 'student.safetensors'}"])):
        message = call(module, *where, *more)
        assert "holds a run already, whose checkpoints/" in message
        assert "ckpt_path=last" in message
    assert (trained / "run" / "results.json").read_bytes() == before


def test_evaluate_repeats_the_score_of_the_run(call, trained, tmp_path):
    where = [*TINY, f"data.root={trained / 'data'}", "hydra.run.dir=scored"]
    assert call(evaluate, *where, f"weights={trained / 'run' / 'student.safetensors'}") is None
    assert results(tmp_path, "scored")["mIoU"] == results(trained, "run")["mIoU"]
    assert results(tmp_path, "scored")["protocol"] == "full-res"
    assert call(evaluate, *where, f"weights={trained / 'run/checkpoints/last.ckpt'}", "protocol=transkd-paper") is None
    assert results(tmp_path, "scored")["protocol"] == "transkd-paper"


def test_evaluate_on_data_of_other_classes(call, trained, camvid_root):
    message = call(evaluate, "+experiment=camvid", f"data.root={camvid_root}",
                   f"weights={trained / 'run' / 'student.safetensors'}")  # fmt: skip
    assert "has 19 classes" in message
    assert "camvid has 11" in message


@pytest.fixture
def frames(tmp_path):
    """A folder with images of unlike sizes, one of them deeper down."""
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (40, 56)), ("deep/b.jpg", (33, 47))):
        path = tmp_path / "frames" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return tmp_path / "frames"


def written(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [("", ["a", "deep/b"]), ("a.png", ["a"]), ("*.png", ["a"]), ("**/*.jpg", ["deep/b"])],
)
def test_predict(call, trained, frames, tmp_path, pattern, names):
    weights = trained / "run" / "student.safetensors"
    assert call(predict, f"weights={weights}", f"input={frames / pattern}", "output=out") is None
    assert written(tmp_path / "out") == sorted(
        f"{kind}/{n}.png" for kind in ("ids", "colour", "overlay") for n in names
    )
    for name, size in (("a", (40, 56)), ("deep/b", (33, 47))):
        if name in names:
            ids = np.asarray(Image.open(tmp_path / "out" / "ids" / f"{name}.png"))
            assert ids.shape == size
            assert ids.max() < 19
            assert np.asarray(Image.open(tmp_path / "out" / "overlay" / f"{name}.png")).shape == (*size, 3)


def test_predict_turns_a_photograph_upright(call, trained, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((40, 56, 3), np.uint8)).save(tmp_path / "photo.jpg", exif=exif)
    weights = trained / "run" / "student.safetensors"
    assert call(predict, f"weights={weights}", f"input={tmp_path / 'photo.jpg'}", "output=out") is None
    assert Image.open(tmp_path / "out" / "ids" / "photo.png").size == (40, 56)


def test_predict_writes_the_archive_of_a_test_server(call, trained, frames, tmp_path):
    weights = f"weights={trained / 'run' / 'student.safetensors'}"
    message = call(predict, weights, f"input={frames}", "archive=cityscapes", "output=out")
    assert "a.png is not named as in the data set" in message
    assert not (tmp_path / "out").exists()
    (frames / "a.png").rename(tmp_path / "ulm_000000_000019_leftImg8bit.png")
    assert call(predict, weights, f"input={tmp_path}/ulm*", "archive=cityscapes", "output=out") is None
    with zipfile.ZipFile(tmp_path / "out" / "cityscapes.zip") as archive:
        (name,) = archive.namelist()
        submitted = np.asarray(Image.open(BytesIO(archive.read(name))))
    assert name == "ulm_000000_000019_pred_labelIds.png"
    ids = np.asarray(Image.open(tmp_path / "out" / "ids" / "ulm_000000_000019_leftImg8bit.png"))
    official = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert np.array_equal(submitted, np.array(official)[ids])


def test_predict_names_a_truncated_image_and_segments_the_others(call, trained, frames, tmp_path):
    whole = (frames / "a.png").read_bytes()
    (frames / "broken.png").write_bytes(whole[: len(whole) // 2])
    message = call(predict, f"weights={trained / 'run' / 'student.safetensors'}", f"input={frames}", "output=out")
    assert "frames/broken.png" in message
    assert "ids/a.png" in written(tmp_path / "out")


def test_predict_without_images_or_weights(call, trained, frames, tmp_path):
    weights = f"weights={trained / 'run' / 'student.safetensors'}"
    assert "no images for input=nowhere" in call(predict, weights, "input=nowhere")
    (tmp_path / "foreign.pth").write_bytes(b"not weights at all")
    assert "not a readable weights file" in call(predict, "weights=foreign.pth", f"input={frames}")
    assert "weights has no value" in call(predict, "input=.")


def test_commands_run_as_modules_from_any_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "transkd.train", "distill=nope"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_replay_answers_as_the_other_commands(call, tmp_path, monkeypatch):
    assert call(replay, "nowhere").startswith(
        "error: there is no nowhere: expected the folder of a run that ended with"
    )
    for error in (MemoryError(), ZeroDivisionError("0")):
        monkeypatch.setattr("transkd.training.replaying.replay", mock.Mock(side_effect=error))
        assert call(replay, "run").startswith(("error: out of memory", "error: a fault of transkd"))
    assert "ZeroDivisionError" in (tmp_path / "error.txt").read_text()


@pytest.mark.slow
def test_two_processes_share_a_run(trained, tmp_path):
    """DDP on the CPU: one student, one table, every validation image once."""
    shutil.copytree(trained / "data", tmp_path / "data")
    two = ["trainer.devices=2", "trainer.strategy=ddp", "hydra.run.dir=two", "distill=transkd_ea"]
    command = [sys.executable, "-m", "transkd.train", *TINY, *two, f"data.root={tmp_path / 'data'}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path, "two")["steps"] == 4  # 2 epochs of 8 images, 2 processes with 2 images each
    checkpoint = torch.load(tmp_path / "two" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4
    weights = f"weights={tmp_path / 'two' / 'student.safetensors'}"
    command = [
        sys.executable,
        "-m",
        "transkd.evaluate",
        *TINY,
        f"data.root={tmp_path / 'data'}",
        weights,
        "hydra.run.dir=one",
    ]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, timeout=300)
    assert results(tmp_path, "one")["mIoU"] == results(tmp_path, "two")["mIoU"]


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "export"])
@pytest.mark.parametrize("arguments", [["--help"], ["+experiment=nope"]])
def test_answers_before_anything_heavy_is_imported(tmp_path, command, arguments):
    heavy = {"torch", "lightning", "timm", "albumentations", "torchmetrics", "transformers"}
    program = (
        f"import sys, runpy; sys.argv = ['{command}', *{arguments}]\n"
        f"try: runpy.run_module('transkd.{command}', run_name='__main__')\n"
        f"finally: print('loaded:', sorted({heavy} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.rstrip().endswith("loaded: []")
    assert "is powered by Hydra" in done.stdout or done.stderr.startswith("error: unknown experiment")


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("module", [predict, evaluate])
def test_freed_memory_is_kept_where_a_network_only_looks(call, tmp_path, monkeypatch, module, keeps):
    asked = []
    monkeypatch.setattr("transkd.training.process.keep_freed_memory", lambda: asked.append(True))
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    others = ["input=image.png"] if module is predict else ["+experiment=demo"]
    message = call(module, "weights=nowhere.safetensors", f"keep_freed_memory={str(keeps).lower()}", *others)
    assert "nowhere.safetensors" in message
    assert bool(asked) == keeps
