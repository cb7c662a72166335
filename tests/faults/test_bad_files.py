"""Damaged, foreign and malicious files of weights: one line for the user, or exactly the network that was saved."""

import copy
import io
import json
import os
import signal
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from transkd.deploy.loading import load_network
from transkd.errors import UserError
from transkd.models import create_segmenter, load_segmenter, save_segmenter
from transkd.models.storage.card import CARD, HASH, describe, fingerprint
from transkd.settings import NetworkSettings

SEED = 16
BUDGET = 20  # seconds for a file, after which a test fails instead of hanging
CLASSES = 5
SIZES = {"channels": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "heads": [1, 2, 3, 4]}
STATED = NetworkSettings(name="segformer_b0", num_classes=CLASSES, width=8, encoder=SIZES)


@pytest.fixture(autouse=True)
def _budget():
    def late(*_):
        raise TimeoutError(f"no answer within {BUDGET} s")

    before = signal.signal(signal.SIGALRM, late)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return create_segmenter("segformer_b0", CLASSES, width=8, encoder=SIZES).eval()


@pytest.fixture(scope="module")
def whole(network, tmp_path_factory):
    """The bytes of the same network in each kind of file."""
    folder = tmp_path_factory.mktemp("whole")
    save_segmenter(network, folder / "student.safetensors", experiment="a test")
    checkpoint, plain = io.BytesIO(), io.BytesIO()
    tensors = {f"student.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": tensors, CARD: describe(network)}, checkpoint)
    torch.save(network.state_dict(), plain)
    return {
        "student.safetensors": (folder / "student.safetensors").read_bytes(),
        "last.ckpt": checkpoint.getvalue(),
        "student.pth": plain.getvalue(),
    }


def answer(path):
    """The message for the user, or the loaded network and its card; anything else raised is a traceback."""
    signal.alarm(BUDGET)
    try:
        return load_network(str(path), STATED if path.suffix == ".pth" else NetworkSettings())
    except UserError as error:
        message = str(error)
        assert "\n" not in message
        assert path.name in message
        return message
    finally:
        signal.alarm(0)


def is_right(loaded, network):
    ours, theirs = network.state_dict(), loaded[0].state_dict()
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    return same and torch.equal(network.mean, loaded[0].mean) and torch.equal(network.std, loaded[0].std)


FILES = ["student.safetensors", "last.ckpt", "student.pth"]


@pytest.mark.parametrize("name", FILES)
def test_a_whole_file_is_read(whole, network, tmp_path, name):
    (tmp_path / name).write_bytes(whole[name])
    assert is_right(answer(tmp_path / name), network)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_refused(whole, tmp_path, name):
    path, length = tmp_path / name, len(whole[name])
    for cut in {0, 1, 7, 8, 9, 100, length - 1, *np.random.default_rng(SEED).integers(0, length, 12).tolist()}:
        path.write_bytes(whole[name][:cut])
        assert isinstance(answer(path), str), cut


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_or_does_not_matter(whole, network, tmp_path, name):
    """In the header, the directory of the archive, and among the values."""
    path, content, rng = tmp_path / name, whole[name], np.random.default_rng(SEED)
    found = 0
    places = [
        *rng.integers(0, 400, 15),
        *rng.integers(0, len(content), 30),
        *rng.integers(len(content) - 400, len(content), 15),
    ]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        loaded = answer(path)
        found += isinstance(loaded, str)
        assert isinstance(loaded, str) or is_right(loaded, network), int(place)
    assert found > len(places) // 2


def with_first(tensor, value):
    tensor.view(-1)[0] = value
    return tensor


VALUES = {
    "nan": ("head.linear_pred.bias", lambda tensor: tensor.fill_(torch.nan), "NaN or infinite"),
    "infinity": ("encoder.norm2.weight", lambda tensor: with_first(tensor, torch.inf), "NaN or infinite"),
    "negative variance": ("head.linear_fuse.bn.running_var", lambda t: with_first(t, -1.0), "negative variances"),
    "integers": ("head.linear_pred.weight", lambda tensor: tensor.long(), "type int64, expected floating point"),
    "truth values": ("head.linear_pred.weight", lambda tensor: tensor > 0, "type bool"),
    "complex": ("encoder.norm1.weight", lambda tensor: tensor.to(torch.complex64), "type complex64"),
    "eight bits": ("encoder.norm1.weight", lambda tensor: tensor.to(torch.float8_e4m3fn), "type float8_e4m3fn"),
    "too large": ("encoder.norm1.weight", lambda tensor: tensor.double() * 1e300, "NaN or infinite"),
    "negative count": ("head.linear_fuse.bn.num_batches_tracked", lambda tensor: tensor - 1, "no counts"),
    "shape": ("encoder.norm1.weight", lambda tensor: tensor[:3], r"encoder.norm1.weight: expected [8], got [3]"),
    "scalar": ("head.linear_pred.weight", lambda tensor: tensor.sum(), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("kind", VALUES)
def test_wrong_values_are_refused_by_name(network, tmp_path, kind, suffix):
    """A file that is whole, of a training that failed or of another program."""
    name, change, message = VALUES[kind]
    tensors = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    tensors[name] = change(tensors[name])
    path = tmp_path / f"student.{suffix}"
    if suffix == "pth":
        torch.save(tensors, path)
    else:
        card = describe(network)
        card[HASH] = fingerprint(tensors, card)
        path.write_bytes(safetensors.torch.save(tensors, metadata={CARD: json.dumps(card)}))
    said = answer(path)
    assert isinstance(said, str)
    if kind == "scalar":
        assert "head.linear_pred.weight" in said or message in said
    else:
        assert message in said
        assert name in said


@pytest.mark.parametrize("change", [lambda t: t.to_sparse(), lambda t: torch.empty_like(t, device="meta")])
def test_tensors_without_plain_values_are_refused(network, tmp_path, change):
    tensors = network.state_dict()
    torch.save({**tensors, "head.linear_pred.bias": change(tensors["head.linear_pred.bias"])}, tmp_path / "odd.pth")
    said = answer(tmp_path / "odd.pth")
    assert "head.linear_pred.bias" in said or "not a readable weights file" in said


# Cards. Each change is a path in the card and a value; DROP removes the entry.

DROP = object()
DEEP = json.loads("[" * 500 + "]" * 500)
MALFORMED = [
    ("recipe", 5), ("recipe", "segformer_b0"), ("recipe", []), ("recipe", {}), ("recipe", True),
    ("recipe.name", 5), ("recipe.name", None), ("recipe.name", DROP), ("recipe.name", ["segformer_b0"]),
    ("recipe.name", "no_such_network"), ("recipe.name", ""), ("recipe.name", "hf_hub:somebody/network"),
    ("recipe.name", "local-dir:/tmp"), ("recipe.name", "../segformer_b0"),
    ("recipe.name", "resnet18"), ("recipe.name", "vit_base_patch16_224"), ("recipe.name", "a" * 5000),
    ("recipe.num_classes", "5"), ("recipe.num_classes", -1), ("recipe.num_classes", 0), ("recipe.num_classes", 5.0),
    ("recipe.num_classes", 10**12), ("recipe.num_classes", 6), ("recipe.num_classes", True),
    ("recipe.num_classes", DROP), ("recipe.head", 3), ("recipe.head", "nope"), ("recipe.head", "fpn"),
    ("recipe.width", -8), ("recipe.width", 10**9), ("recipe.width", "8"), ("recipe.width", 60000),
    ("recipe.scale", 0), ("recipe.scale", -1.0), ("recipe.scale", 1e9), ("recipe.scale", "half"),
    ("recipe.scale", float("nan")), ("recipe.encoder", []), ("recipe.encoder", "tiny"), ("recipe.encoder", DEEP),
    ("recipe.encoder.channels", 8), ("recipe.encoder.channels", [8]), ("recipe.encoder.channels", "abc"),
    ("recipe.encoder.channels", [8, 16, 24, 60000]), ("recipe.encoder.channels", [8, 16, 24, 10**12]),
    ("recipe.encoder.channels", [-8, 16, 24, 32]), ("recipe.encoder.channels", {"0": 8}),
    ("recipe.encoder.channels", DEEP), ("recipe.encoder.depths", [1, 1, 1, 60000]), ("recipe.encoder.depths", [1]),
    ("recipe.encoder.depths", [1, 1, 1, -1]), ("recipe.encoder.heads", [0, 0, 0, 0]),
    ("recipe.encoder.heads", [5, 5, 5, 5]), ("recipe.encoder.heads", None), ("recipe.encoder.drop_path_rate", "high"),
    ("recipe.encoder.nope", 1), ("mean", 5), ("mean", [0.5]), ("mean", ["a", "b", "c"]), ("mean", [1e300, 0, 0]),
    ("mean", [float("nan"), 0, 0]), ("std", [0, 1, 1]), ("std", [-1, 1, 1]), ("std", [float("inf"), 1, 1]),
    ("std", {"r": 1}), ("lineage", "mine"), ("lineage", [5]), ("lineage", [{}]),
    ("lineage", [{"part": "soul", "source": "x"}]), ("lineage", [{"part": "code", "source": 5}]),
    ("class_names", "road"), ("class_names", [1, 2]), ("class_names", {"0": "road"}), ("palette", "red"),
    ("palette", [[1, 2]]), ("palette", [[1, 2, 300]]), ("palette", [["a", "b", "c"]]), ("palette", [[0, 0, 0]] * 300),
    ("eval_transform", "resize"), ("eval_transform", [1]), ("name", 5), ("num_classes", "five"), ("num_classes", -3),
    ("plugins", "os"), ("plugins", [5]), ("plugins", ["os; rm"]), ("transkd_version", {"a": 1}),
    ("std", DROP), ("mean", DROP),
]  # fmt: skip


def with_card(network, path, changes, raw=None):
    """Write the network with a changed card, under a hash that fits: whoever makes such a file can compute it."""
    card = copy.deepcopy(json.loads(json.dumps(describe(network))))
    for place, value in changes:
        *parents, key = place.split(".")
        entry = card
        for parent in parents:
            entry = entry[parent]
        if value is DROP:
            del entry[key]
        else:
            entry[key] = value
    tensors = network.state_dict()
    card[HASH] = fingerprint(tensors, card)
    text = json.dumps(card) if raw is None else raw
    path.write_bytes(safetensors.torch.save(tensors, metadata={CARD: text}))


def test_malformed_cards_are_one_line(network, tmp_path):
    path = tmp_path / "student.safetensors"
    for place, value in MALFORMED:
        with_card(network, path, [(place, value)])
        assert isinstance(answer(path), str), (place, str(value)[:60])


@pytest.mark.parametrize(
    "raw",
    ["", "{", "5", "null", "[]", '"card"', "nan", "[" * 100_000, '{"a":' * 100_000, '{"recipe": ' + "9" * 5000 + "}"],
)
def test_what_is_no_card_is_one_line(network, tmp_path, raw):
    with_card(network, tmp_path / "student.safetensors", [], raw)
    assert isinstance(answer(tmp_path / "student.safetensors"), str)


def test_malformed_cards_of_checkpoints_are_one_line(network, tmp_path):
    tensors = {f"student.{name}": tensor for name, tensor in network.state_dict().items()}
    for card in (5, [1], "card", {"recipe": {"name": torch.zeros(2)}}, {1: 2}, {"recipe": {"name": b"bytes"}}):
        torch.save({"state_dict": tensors, CARD: card}, tmp_path / "last.ckpt")
        assert isinstance(answer(tmp_path / "last.ckpt"), str), card


class Bomb:
    """Unpickled, it would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


ELSEWHERE = [
    ("recipe.weights", "hf://somebody/network"), ("recipe.weights", "timm://resnet18.a1_in1k"),
    ("recipe.weights", "bomb.pth"), ("recipe.weights", "/etc/passwd"), ("recipe.license", "none needed"),
    ("recipe._target_", "os.mkdir"), ("recipe.classifier", "new"), ("recipe.mean", [0, 0, 0]),
    ("recipe.encoder.checkpoint_path", "bomb.pth"), ("recipe.encoder.pretrained", True),
    ("recipe.encoder.pretrained_cfg", {"file": "bomb.pth"}), ("recipe.encoder.pretrained_cfg_overlay", {"file": "x"}),
    ("recipe.encoder.pretrained_cfg", "a1_in1k"), ("recipe.encoder._target_", "os.mkdir"),
    ("recipe.encoder.cache_dir", "cache"), ("recipe.encoder.features_only", True), ("recipe.encoder.in_chans", 4),
]  # fmt: skip


@pytest.mark.parametrize("name", ["segformer_b0", "resnet18", "pvt_v2_b0"])
def test_a_card_opens_fetches_and_executes_nothing(network, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("fetched"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("connected"))
    torch.save(Bomb(), "bomb.pth")
    for place, value in ELSEWHERE:
        encoder = ("recipe.encoder", dict(SIZES) if name == "segformer_b0" else {})
        with_card(network, tmp_path / "student.safetensors", [encoder, ("recipe.name", name), (place, value)])
        said = answer(tmp_path / "student.safetensors")
        assert isinstance(said, str), place
        assert place.rsplit(".", 1)[-1] in said or "recipe.encoder: expected numbers" in said
    assert not (tmp_path / "executed").exists()


def test_other_notes_are_plain_and_keep_out_of_the_terminal(network, tmp_path):
    path = tmp_path / "student.safetensors"
    notes = [("mIoU", 0.5), ("hook", "\x1b[2J"), ("deep", {"a": 1}), ("huge", 10**400), ("class_names", ["a\x1b[2Jb"])]
    with_card(network, path, notes)
    _, card = answer(path)
    assert card["mIoU"] == 0.5
    assert not {"hook", "deep", "huge"} & card.keys()
    assert card["class_names"] == ["a\N{REPLACEMENT CHARACTER}[2Jb"]


# Files that are no files of weights


@pytest.mark.parametrize("name", ["student.safetensors", "student.pth", "model.safetensors", "config.json"])
def test_a_pipe_is_refused(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "segformer"}')
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    signal.alarm(BUDGET)
    with pytest.raises(UserError, match="is a pipe, not a regular file"):
        load_segmenter(folder / name if name.startswith("student") else folder)


@pytest.mark.parametrize("source", ["/dev/zero", "/nowhere", "a" * 5000, "with\0null", "/root/\udcff", ""])
def test_odd_paths(source):
    with pytest.raises(UserError):
        load_segmenter(source)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no weights"),
        ([torch.zeros(2)], "no weights"),
        ({5: torch.zeros(2)}, "no weights"),
        ({"state_dict": {}}, "no weights"),
        ({"state_dict": {"student.x": torch.zeros(1)}, CARD: {"recipe": None, "name": "FCN"}}, "evaluate takes it"),
        ({"encoder.fc.lora_a": torch.zeros(1, 2, 3), CARD: {"name": "x"}}, "low-rank terms of encoder.fc"),
        ({"encoder.block.0.0.attention.self.key.weight": torch.zeros(()),
          "encoder.block.0.0.attention.self.value.weight": torch.zeros(())}, "not its shapes"),
    ],
)  # fmt: skip
def test_contents_that_are_no_network(tmp_path, content, message):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=message) as caught:
        load_segmenter(tmp_path / "odd.pth")
    assert "\n" not in str(caught.value)


def test_a_compressed_archive_is_refused(tmp_path, whole):
    """It could unpack to more than any memory."""
    with (
        zipfile.ZipFile(io.BytesIO(whole["student.pth"])) as source,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert "compressed" in answer(tmp_path / "packed.pth")
