"""A run on letterboxed images: what it scores, what evaluate scores and what predict draws are one thing."""

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from PIL import Image
from runs import composed, results

from transkd.data import find_acdc
from transkd.data.dataset import read_image
from transkd.deploy.predicting import predict
from transkd.errors import UserError
from transkd.models import load_segmenter
from transkd.run import run
from transkd.settings import PredictSettings
from transkd.training.evaluation import evaluate

pytestmark = pytest.mark.slow


def eval_transform(*steps):
    listed = ",".join(f"{{_target_:albumentations.{name},{arguments}}}" for name, arguments in steps)
    return f"data.eval_transform={{_target_:albumentations.Compose,transforms:[{listed}]}}"


LETTERBOX = eval_transform(
    ("LongestMaxSize", "max_size:96"), ("PadIfNeeded", "min_height:96,min_width:96,fill:7,fill_mask:0")
)
CROP = eval_transform(("CenterCrop", "height:32,width:32"))
ALONE = ["distill=none", "term=[dice]", "protocol=full-res", "student.from_teacher=false", "trainer.max_epochs=1"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A run of a student alone, and its predictions of the validation images."""
    root = tmp_path_factory.mktemp("scored")
    weights = "criterion.terms.task.term.class_weights=sqrt"
    run(composed(root, "run", *ALONE, LETTERBOX, weights))
    where = {"input": str(root / "data/rgb_anon"), "output": str(root / "predictions")}
    predict(PredictSettings(weights=str(root / "run/student.safetensors"), device="cpu", **where))
    return root


def predictions(root):
    """Predicted class ids and labels of each validation image."""
    for pair in find_acdc(root / "data", "val"):
        path = (root / "predictions/ids" / pair.image.relative_to(root / "data/rgb_anon")).with_suffix(".png")
        yield pair, np.asarray(Image.open(path)), np.asarray(Image.open(pair.label))


def test_predictions_lie_on_the_image(root):
    """By hand: 32×64 becomes 48×96 with 24 rows of 7 above and below; on 64×64 one pixel is one of the image."""
    network, _ = load_segmenter(root / "run/student.safetensors")
    for pair, ids, _ in predictions(root):
        image = cv2.resize(read_image(pair.image), (96, 48), interpolation=cv2.INTER_LINEAR)
        padded = np.full((96, 96, 3), 7, np.uint8)
        padded[24:72] = image
        with torch.no_grad():
            logits = network.eval()(torch.from_numpy(padded.transpose(2, 0, 1).copy())[None]).logits
        canvas = F.interpolate(logits, (64, 64), mode="bilinear", align_corners=False)
        expected = canvas[0, :, 16:48].argmax(0).numpy()
        assert ids.shape == (32, 64)
        assert (ids == expected).mean() > 0.999  # but for equal scores


def test_the_score_is_that_of_the_predictions(root):
    confusion = np.zeros((19, 19))
    for _, ids, label in predictions(root):
        valid = label != 255
        np.add.at(confusion, (label[valid], ids[valid]), 1)
    with np.errstate(invalid="ignore"):
        iou = np.diag(confusion) / (confusion.sum(0) + confusion.sum(1) - np.diag(confusion))
    found = results(root, "run")
    assert found["mIoU"] == pytest.approx(np.nanmean(iou), abs=1e-6)
    assert found["conditions"].keys() == {"fog", "night", "rain", "snow"}


def test_evaluate_gives_the_scores_again_and_those_of_other_protocols(root, caplog):
    where = [*ALONE, LETTERBOX, f"+weights={root / 'run/student.safetensors'}"]
    evaluate(composed(root, "again", *where))
    assert results(root, "again")["mIoU"] == results(root, "run")["mIoU"]
    assert "was validated with" not in caplog.text
    evaluate(composed(root, "smaller", *where, eval_transform(("SmallestMaxSize", "max_size:64"))))
    assert "was validated with LongestMaxSize(max_size=96), PadIfNeeded(min_height=96" in caplog.text
    assert results(root, "again")["conditions"] == results(root, "run")["conditions"]
    evaluate(
        composed(root, "slide", *where, "protocol=slide", "protocols.slide.window=48", "protocols.slide.stride=32")
    )
    assert "48×48 every 32" in results(root, "slide")["protocol_description"]
    evaluate(composed(root, "boundary", *where, "protocol=boundary"))
    scores = [results(root, name)["mIoU"] for name in ("run", "slide", "boundary")]
    assert len(set(scores)) == 3


def test_class_weights_stand_in_the_configuration_as_numbers(root):
    stored = OmegaConf.load(root / "run/config.yaml").criterion.terms
    labels = [np.asarray(Image.open(pair.label)) for pair in find_acdc(root / "data", "train")]
    counts = np.bincount(np.concatenate([label.ravel() for label in labels]), minlength=256)[:19]
    expected = [1 / np.sqrt(count / counts.sum()) if count else 0 for count in counts]
    assert list(stored.task.term.class_weights) == pytest.approx(expected, rel=1e-5)
    assert stored.dice.term.class_weights is None
    assert len(list((root / "class_counts").glob("*.json"))) == 1


def test_a_transform_that_cannot_be_undone_is_refused_before_training(root):
    with pytest.raises(UserError, match="it cuts off pixels of the image"):
        run(composed(root, "cropped", *ALONE, CROP))
    run(composed(root, "input-res", *ALONE, CROP, "protocol=input-res"))
    weights, where = str(root / "input-res/student.safetensors"), str(root / "data/rgb_anon")
    cropping = PredictSettings(weights=weights, device="cpu", input=where, output=str(root / "none"))
    with pytest.raises(UserError, match="resize=false"):
        predict(cropping)
