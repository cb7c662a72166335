import numpy as np
import pytest
from PIL import Image

from transkd import files
from transkd.data.classes import CITYSCAPES
from transkd.data.writing import save_png
from transkd.errors import UserError
from transkd.pictures import colourise, draw_curves, legend_of, overlay, palette_of, read_metrics, save_sheet

METRICS = """epoch,lr-AdamW,step,train/loss_epoch,train/loss_step,train/task,val/full-res/mIoU
,0.001,9,,1.5,,
0,,19,1.25,,1.0,
0,,19,,,,0.25
,0.0005,29,,1.125,,
1,,39,1.0,,0.75,0.5
"""


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(METRICS)
    return path


def test_colours_by_class_and_black_for_ignored():
    label = np.array([[0, 13], [255, 18]], dtype=np.uint8)
    colours = colourise(label, CITYSCAPES.palette)
    assert colours.dtype == np.uint8
    assert colours.tolist() == [[[128, 64, 128], [0, 0, 142]], [[0, 0, 0], [119, 11, 32]]]


def test_overlay_by_hand():
    image, colours = np.full((1, 1, 3), 200, np.uint8), np.array([[[0, 100, 240]]], dtype=np.uint8)
    assert overlay(image, colours, 0.25).tolist() == [[[150, 175, 210]]]
    assert np.array_equal(overlay(image, colours, 0), image)
    assert np.array_equal(overlay(image, colours, 1), colours)


@pytest.mark.parametrize("opacity", [0.1, 0.3, 0.5, 0.7])
def test_overlay_of_a_picture_on_itself_is_itself(opacity):
    image = np.arange(255, dtype=np.uint8).reshape(5, 17, 3)
    assert np.array_equal(overlay(image, image, opacity), image)


def test_metrics_are_read_by_name(metrics):
    assert read_metrics(metrics) == {
        "lr-AdamW": [(9, 0.001), (29, 0.0005)],
        "train/loss_step": [(9, 1.5), (29, 1.125)],
        "train/loss_epoch": [(19, 1.25), (39, 1.0)],
        "train/task": [(19, 1.0), (39, 0.75)],
        "val/full-res/mIoU": [(19, 0.25), (39, 0.5)],
    }


def axes_of(monkeypatch):
    """The figure's axes at the moment of saving."""
    from matplotlib.figure import Figure

    seen = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (seen.extend(self.axes), save(self, *a, **k)))
    return seen


def test_curves(metrics, tmp_path, monkeypatch):
    axes = axes_of(monkeypatch)
    draw_curves(metrics, tmp_path / "curves.png")
    drawn = [{line.get_label(): line.get_xydata().tolist() for line in axis.lines} for axis in axes]
    assert drawn == [
        {"train/loss": [[19, 1.25], [39, 1.0]], "train/task": [[19, 1.0], [39, 0.75]]},
        {"val/full-res/mIoU": [[19, 0.25], [39, 0.5]]},
        {"lr-AdamW": [[9, 0.001], [29, 0.0005]]},
    ]
    assert Image.open(tmp_path / "curves.png").size[0] > 500


def test_a_single_value_of_a_curve_is_seen(tmp_path, monkeypatch):
    """A line of one point has no length."""
    (tmp_path / "metrics.csv").write_text("epoch,step,train/task,val/full-res/mIoU\n0,9,1.0,\n0,9,,0.5\n")
    axes = axes_of(monkeypatch)
    draw_curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
    assert [line.get_marker() for axis in axes for line in axis.lines] == [".", "."]


def test_the_legend_of_a_sheet_names_the_classes_that_occur(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    label = np.array([[0, 13], [255, 0]], dtype=np.uint8)
    rows = [[np.zeros((8, 16, 3), np.uint8)] * 2]
    save_sheet(rows, ["image", "label"], tmp_path / "sheet.png", legend=legend_of([label, label], CITYSCAPES))
    (legend,) = figures[0].legends
    entries = zip(legend.get_texts(), legend.get_patches(), strict=True)
    named = {text.get_text(): tuple(round(255 * part) for part in patch.get_facecolor()[:3]) for text, patch in entries}
    assert named == {"road": (128, 64, 128), "car": (0, 0, 142), "ignored": (0, 0, 0)}


def test_a_legend_of_many_long_names_lies_within_the_sheet(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (self.draw_without_rendering(), figures.append(self)))
    legend = {f"a class with a name of many words {i}": (i, i, i) for i in range(40)}
    save_sheet([[np.zeros((8, 16, 3), np.uint8)] * 3], ["a", "b", "c"], tmp_path / "sheet.png", legend=legend)
    box, whole = figures[0].legends[0].get_window_extent(), figures[0].bbox
    assert whole.x0 <= box.x0 < box.x1 <= whole.x1
    assert whole.y0 <= box.y0 < box.y1 <= whole.y1


def test_curves_of_a_run_without_validation(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,step,train/task\n0,9,1.0\n")
    draw_curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").is_file()


def test_sheet(tmp_path, monkeypatch):
    axes = axes_of(monkeypatch)
    rows = [[np.full((8, 16, 3), 40 * i + 10 * j, np.uint8) for j in range(3)] for i in range(2)]
    save_sheet(rows, ["image", "label", "student"], tmp_path / "sheet.png", title="demo")
    shown = [axis.get_images()[0].get_array() for axis in axes]
    assert all(np.array_equal(a, b) for a, b in zip(shown, [cell for row in rows for cell in row], strict=True))
    assert [axis.get_title() for axis in axes] == ["image", "label", "student", "", "", ""]
    assert Image.open(tmp_path / "sheet.png").size[0] > 500


def test_a_sheets_rows_must_be_full(tmp_path):
    row = [np.zeros((4, 4, 3), np.uint8)] * 2
    with pytest.raises(ValueError, match="shorter"):
        save_sheet([row], ["image", "label", "student"], tmp_path / "sheet.png")


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_images_round_trip(tmp_path, shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path / "a" / "b.png"
    save_png(pixels, path)
    assert np.array_equal(np.asarray(Image.open(path)), pixels)
    longest = tmp_path / f"{'é' * 125}.png"  # 254 bytes, of the 255 that file systems take
    save_png(pixels, longest)
    assert longest.is_file()


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match=r"cannot write .*a\.png: disk full"):
        save_png(np.zeros((2, 2), np.uint8), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_a_network_without_colours_gets_some():
    assert palette_of({"num_classes": 2, "palette": [[1, 2, 3], [4, 5, 6]]}) == [[1, 2, 3], [4, 5, 6]]
    known = {"num_classes": 19, "class_names": list(CITYSCAPES.names)}
    assert palette_of(known) == CITYSCAPES.palette
    made = palette_of({"num_classes": 40})
    assert len({tuple(colour) for colour in made}) == 40
    assert all(0 <= part <= 255 for colour in made for part in colour)
    assert [0, 0, 0] not in made
