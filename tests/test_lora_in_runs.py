"""Low-rank terms in whole runs: what is trained, what is left at the end, and that checkpoints go on and load."""

import logging

import pytest
import torch
from runs import assert_identical, composed, results, run_until_killed, student

from transkd.errors import UserError
from transkd.models import create_segmenter, load_segmenter, save_segmenter
from transkd.run import run

RANK = 4
DEPTHS = (1, 2, 1, 1)  # of the student; the teacher has 2 blocks in each stage
SHORT = ["pictures=0", "trainer.limit_train_batches=2", "distill=wecolora", f"student.lora.rank={RANK}"]
SHORT += [f"+student.network.encoder.depths=[{','.join(map(str, DEPTHS))}]"]
ADAPTED = ("attn.q.", "attn.kv.", "attn.proj.", "mlp.fc1.", "mlp.fc2.")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def teacher(root):
    torch.manual_seed(1)
    save_segmenter(create_segmenter("segformer_b0", num_classes=19), root / "teacher.safetensors")
    return f"teacher.weights={root / 'teacher.safetensors'}"


@pytest.fixture(scope="module")
def finished(root, teacher):
    run(composed(root, "finished", *SHORT, teacher, "trainer.max_epochs=4"))
    return root / "finished"


def trained_by_hand(channels=(32, 64, 160, 256), expansion=4):
    """Numbers of the low-rank terms: a rank of rows and columns for each matrix, keys and values apart."""
    attention = [4 * (c + c) for c in channels]  # q, k, v, proj
    mlp = [2 * (c + expansion * c) for c in channels]
    return RANK * sum(d * (a + m) for d, a, m in zip(DEPTHS, attention, mlp, strict=True))


def test_what_is_left_is_the_plain_student(root, finished, teacher):
    network = create_segmenter("segformer_b0", num_classes=19, encoder={"depths": DEPTHS})
    network.load_state_dict(student(root, "finished"), strict=True)
    assert results(root, "finished")["parameters"]["student"] == sum(p.numel() for p in network.parameters())


def test_copied_weights_stay_but_for_the_terms(root, finished):
    taught = load_segmenter(root / "teacher.safetensors")[0].state_dict()
    moved = {name for name, tensor in student(root, "finished").items() if not torch.equal(tensor, taught[name])}
    encoder = {name for name in moved if name.startswith("encoder.")}
    assert encoder
    assert all(name.endswith("weight") and any(layer in name for layer in ADAPTED) for name in encoder)
    assert "head.linear_pred.weight" in moved


def test_the_log_tells_what_is_trained(root, teacher, caplog):
    caplog.set_level(logging.INFO)
    run(composed(root, "logged", *SHORT, teacher, "trainer.max_epochs=1"))
    head = sum(p.numel() for p in create_segmenter("segformer_b0", num_classes=19).head.parameters())
    expected = f"student: {(trained_by_hand() + head) / 1e6:.2f} M parameters are trained: low-rank terms"
    assert expected in caplog.text


def test_the_checkpoint_holds_the_terms_and_loads_as_plain_weights(root, finished):
    last = finished / "checkpoints" / "last.ckpt"
    names = torch.load(last, weights_only=True)["state_dict"]
    assert "student.encoder.block1.0.attn.q.lora_a" in names
    assert_identical(load_segmenter(last)[0].state_dict(), student(root, "finished"))
    plain = [part for part in SHORT if "lora" not in part]
    run(composed(root, "on", *plain, "distill=none", f"student.weights={last}", "optim.optimizer.lr=0"))
    kept = {name: tensor for name, tensor in student(root, "finished").items() if ".bn." not in name}
    assert_identical({name: tensor for name, tensor in student(root, "on").items() if name in kept}, kept)


def test_resuming_after_a_kill_gives_the_undisturbed_weights(root, finished, teacher, monkeypatch):
    monkeypatch.chdir(root)
    settings = [*SHORT, teacher, "trainer.max_epochs=4", "name=resumed"]
    run_until_killed(composed(root, "outputs/resumed/killed", *settings), 2, monkeypatch)
    run(composed(root, "outputs/resumed/second", *settings, "ckpt_path=last"))
    assert results(root, "outputs/resumed/second")["resumed_from"].endswith("killed/checkpoints/last.ckpt")
    assert_identical(student(root, "finished"), student(root, "outputs/resumed/second"))


def test_weights_of_ones_own_are_adapted(root, teacher):
    start = root / "teacher.safetensors"
    settings = ["distill=none", f"student.weights={start}", "student.lora.rank=2", "student.lora.train=[]"]
    run(composed(root, "own", "pictures=0", "trainer.max_epochs=1", *settings))
    before = load_segmenter(start)[0].state_dict()
    moved = {name for name, tensor in student(root, "own").items() if not torch.equal(tensor, before[name])}
    statistics = {name for name in moved if ".bn." in name}
    assert all(any(layer in name for layer in ADAPTED) for name in moved - statistics)
    assert not any(name.endswith((".weight", ".bias")) for name in statistics)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["distill=none"], r"lora.rank=4 adapts trained weights.*student.weights=PATH.*from_teacher=true"),
        (["distill=wecolora", "student.lora.train=[decoder]"], "no module 'decoder' in the network"),
        (
            ["distill=wecolora", "student.lora.rank=0"],
            "student.lora.rank=0: expected a whole number of at least 1",
        ),
    ],
)
def test_what_does_not_fit_shows_before_anything_long(root, settings, message, caplog):
    caplog.set_level(logging.INFO)
    with pytest.raises(UserError, match=message) as caught:
        run(composed(root, "refused", f"student.lora.rank={RANK}", *settings))
    assert "\n" not in str(caught.value)
    assert "teacher:" not in caplog.text
