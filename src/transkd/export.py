"""Export a network: ``python -m transkd.export weights=student.safetensors format=onnx output=student.onnx``."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transkd.cli import hydra_command
from transkd.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor

    from transkd.models import Segmenter
    from transkd.models.storage.exporting import Format
    from transkd.pictures import Pixels

    Images = list[tuple[str, Pixels]]

REAL_IMAGES = 4
MOST_PIXELS = 1024 * 1024  # of a real image in the check; a larger one is shrunk


def export(cfg: "DictConfig") -> None:
    """Write the network in another format, check what was written against it, and only then put it in place."""
    output = Path(str(cfg.output)).expanduser().absolute()
    with staged(output, is_folder=cfg.format == "hf") as stage:
        summary = write_checked(cfg, stage / output.name)
    print(f"wrote {output}" + (f" and {_beside(output).name}" if cfg.format != "hf" else ""))
    print(summary)


def write_checked(cfg: "DictConfig", path: Path) -> str:
    """Write to ``path`` and beside it, read that back and hold it against the network; gives what to tell the user."""
    from transkd.models import load_segmenter
    from transkd.models.storage.exporting import FORMATS, complete_card
    from transkd.models.storage.lineage import check_license_policy, describe_lineage

    if cfg.format not in FORMATS:
        raise UserError(f"unknown format={cfg.format}; there are: {', '.join(FORMATS)}")
    form = FORMATS[cfg.format]
    if not path.name.endswith(form.suffix):
        raise UserError(f"format={cfg.format} wants a file that ends in {form.suffix}, got output={cfg.output}")
    if cfg.fuse and not form.normalises:
        raise UserError(f"fuse=true is for format=onnx and format=torch; format={cfg.format} holds the plain network")
    _check_packages(cfg.format, form)

    network, source_card = load_segmenter(str(cfg.weights), cfg.license)
    check_license_policy(network.lineage, cfg.license_policy, str(cfg.weights))
    network.eval()
    card = complete_card(network, source_card)
    images = _real_images(cfg.images, form.minimum)
    options = {"opset": cfg.opset} if cfg.format == "onnx" else {}
    with _writing(Path(str(cfg.output))):
        form.write(network.fuse() if cfg.fuse else network, card, path, **options)
        if cfg.format != "hf":  # there preprocessor_config.json is it
            content = json.dumps(_preprocessing(path.name, cfg.format, form, card), indent=2) + "\n"
            _beside(path).write_text(content, encoding="utf-8")
    exported = form.open(path)
    check_parity(network, exported.run, images, form.minimum, float(cfg.tolerance), cfg.format)
    own = sum(parameter.numel() for parameter in network.parameters())
    return (
        f"{exported.parameters:,} {form.counts}; the network has {own:,} parameters\n"
        f"lineage: {describe_lineage(network.lineage)}"
    )


def _check_packages(name: str, form: "Format") -> None:
    for package in form.packages:
        if find_spec(package) is None:
            raise UserError(f"format={name} needs the package {package}: pip install 'transkd[export]'")


# Where it is written


@contextmanager
def staged(output: Path, is_folder: bool) -> Iterator[Path]:
    """A temporary folder beside ``output``; what lies in it at the end moves into place, after an error nothing does.

    Raises:
        UserError: ``output`` cannot be written, or is something that is not ours to replace; before anything is made.
    """
    with _writing(output):
        _check_replaceable(output, is_folder)
        made = [folder for folder in output.parents if not folder.exists()]
    stage = None
    try:
        with _writing(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            stage = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
        yield stage
        with _writing(output):
            for item in list(stage.iterdir()):
                _replace(item, output.with_name(item.name), stage / ".replaced")
        made = []
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # not there, or not empty by now
                folder.rmdir()


def _check_replaceable(output: Path, is_folder: bool) -> None:
    ancestor = next(folder for folder in output.parents if folder.exists())
    if not ancestor.is_dir():
        raise UserError(f"cannot write {output}: {ancestor} is a file; choose another output=…")
    if not is_folder:
        if output.is_dir() or _beside(output).is_dir():
            raise UserError(f"cannot write the file {output}: there is a folder; name a file in output=…")
    elif output.is_dir() and any(output.iterdir()) and not _is_export(output):
        raise UserError(f"{output} holds other files, which are not overwritten; choose a new or empty folder")
    elif output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; format=hf writes a folder")


def _is_export(folder: Path) -> bool:
    try:
        return "transkd" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error


def _replace(new: Path, target: Path, aside: Path) -> None:
    """Move a file or folder over another; a folder that is replaced goes ``aside`` first, and back if that fails."""
    if target.is_dir():
        os.replace(target, aside)
    try:
        os.replace(new, target)
    except OSError:
        if aside.exists():
            os.replace(aside, target)
        raise


# What is said beside it


def _beside(output: Path) -> Path:
    return output.with_suffix(".preprocess.json")


def _preprocessing(name: str, format: str, form: "Format", card: dict[str, Any]) -> dict[str, Any]:
    """All that a program must know to feed the network and to read what it gives."""
    return {
        "model": name,
        "format": format,
        "input": {
            "name": "image",
            "layout": "NCHW",
            "dtype": "float32",
            "channels": "RGB",
            "range": [0, 1],
            "minimum_size": [form.minimum, form.minimum],
        },
        "normalisation": {"mean": card["mean"], "std": card["std"], "inside_graph": form.normalises},
        "output": {
            "name": "logits",
            "layout": "NCHW",
            "dtype": "float32",
            "stride": 4,
            "then": "upsample bilinearly (align_corners=false) to the image's size, then argmax over the channels",
        },
        "eval_transform": card.get("eval_transform"),
        "class_names": card.get("class_names"),
        "palette": card.get("palette"),
        "lineage": card["lineage"],
    }


# Whether it is the same network


class Difference(NamedTuple):
    """How far the exported network is from ours on one batch."""

    images: str
    logits: float
    agreement: float


def check_parity(
    network: "Segmenter",
    run: "Callable[[Tensor], Tensor]",
    images: "Images",
    minimum: int,
    tolerance: float,
    format: str,
) -> None:
    """Run both networks on random and on real images, print the differences, and hold them to ``tolerance``.

    Args:
        network: ours, in eval.
        run: the exported one, see ``transkd.models.storage.exporting.Exported``.
        images: real images by what the table calls them.
        minimum: smallest height and width that the export takes; a square of it is among the random images.
        tolerance: largest difference of a logit.
        format: for the messages.

    Raises:
        UserError: they differ by more, or the exported network does not run.
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    random = torch.Generator().manual_seed(0)
    batches: list[tuple[str, Tensor]] = []
    for height, width in ((minimum, minimum), (96, 160), (75, 133)):  # the last is divided by no stride
        for count in (1, 2):
            image = torch.randint(256, (count, 3, height, width), generator=random, dtype=torch.uint8)
            batches.append(("random", image))
    batches += [(name, torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]) for name, pixels in images]

    table = Table("images", "size", "max |Δ logit|", "same class", title=f"{format} against the network")
    differences = []
    for name, image in batches:
        size = "×".join(str(n) for n in (len(image), *image.shape[2:]))
        try:
            with torch.no_grad():
                ours, theirs = network(image, needs={"logits"}).logits, run(image)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"the exported network does not run on {name} images {size}: {reason}") from error
        if ours.shape != theirs.shape:
            raise UserError(
                f"the exported network gives {list(theirs.shape)} for {name} images {size}, not {list(ours.shape)}"
            )
        same = (ours.argmax(1) == theirs.argmax(1)).float().mean().item()
        differences.append(Difference(f"{name} {size}", (ours - theirs).abs().max().item(), same))
        table.add_row(name, size, f"{differences[-1].logits:.1e}", f"{100 * same:.3f} %")
    Console().print(table)

    failed = [difference for difference in differences if not difference.logits <= tolerance]  # catches NaN too
    if failed:
        worst = max(failed, key=lambda difference: (difference.logits != difference.logits, difference.logits))
        inherent = (
            "; transformers computes LayerNorm with another ε (1e-5) than SegFormer (1e-6)" if format == "hf" else ""
        )
        raise UserError(
            f"format={format} differs from the network by {worst.logits:.2e} in a logit ({worst.images}, "
            f"{100 * worst.agreement:.3f} % of pixels in the same class), tolerance={tolerance:g}{inherent}; "
            "nothing was written"
        )


def _real_images(pattern: str | None, minimum: int) -> "Images":
    """A few of the user's images, or a drawn road scene."""
    if pattern is None:
        import numpy as np

        from transkd.data.synthetic import draw_scene

        return [("drawn scene", draw_scene(np.random.default_rng(0), 192, 384, "rain")[0])]
    from transkd.data.dataset import read_image
    from transkd.predict import find_images

    try:
        _, paths = find_images(str(pattern))
    except UserError as error:
        raise UserError(str(error).replace("input=", "images=")) from error
    chosen = paths[:: -(-len(paths) // REAL_IMAGES)]
    return [(path.name, _bounded(read_image(path), minimum)) for path in chosen]


def _bounded(image: "Pixels", minimum: int) -> "Pixels":
    """An image at its own size, unless the network does not take that or the check would take long."""
    import numpy as np
    from PIL import Image

    height, width = image.shape[:2]
    scale = max(min(1.0, (MOST_PIXELS / (height * width)) ** 0.5), minimum / min(height, width))
    if scale == 1:
        return image
    return np.asarray(Image.fromarray(image).resize((round(width * scale), round(height * scale))))


@hydra_command("export")
def main(cfg: "DictConfig") -> None:
    """Compose, then export."""
    export(cfg)


if __name__ == "__main__":
    main()
