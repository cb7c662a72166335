"""Export a network to another format; the file is read back and compared before it is moved into place."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from transkd.data.images import find_images
from transkd.data.reading import read_image
from transkd.data.synthetic import draw_scene
from transkd.deploy.loading import load_network
from transkd.deploy.parity import Images, check_parity
from transkd.deploy.staging import beside, staged, writing
from transkd.errors import UserError
from transkd.files import sha256
from transkd.models import Segmenter
from transkd.models.storage.exporting import FORMATS, Format, complete_card, smallest
from transkd.models.storage.lineage import check_license_policy, describe_lineage
from transkd.pictures import Pixels
from transkd.settings import ExportSettings

__all__ = ["export"]

REAL_IMAGES = 4
MOST_PIXELS = 1024 * 1024  # larger real images are downscaled for the check


def export(settings: ExportSettings) -> None:
    """Export the network, compare the export with it, and then move it into place.

    Raises:
        UserError: the format is unknown or lacks a package, the outputs differ, or ``output`` cannot be written.
    """
    output = Path(settings.output).expanduser().absolute()
    with staged(output, is_folder=settings.format == "hf") as stage:
        summary = write_checked(settings, stage / output.name)
    print(f"wrote {output}" + (f" and {beside(output).name}" if settings.format != "hf" else ""))
    print(summary)


def write_checked(settings: ExportSettings, path: Path) -> str:
    """Write ``path`` and its description, read it back and compare it with the network; return a summary."""
    if settings.format not in FORMATS:
        raise UserError(f"unknown format={settings.format}; there are: {', '.join(FORMATS)}")
    form = FORMATS[settings.format]
    if not path.name.endswith(form.suffix):
        raise UserError(
            f"format={settings.format} requires a file name with suffix {form.suffix}, got output={settings.output}"
        )
    if settings.fuse and not form.normalises:
        raise UserError(
            f"fuse=true requires format=onnx or format=torch; format={settings.format} stores the unfused network"
        )
    _check_packages(settings.format, form)

    network, source_card = load_network(settings.weights, settings.network, settings.license)
    check_license_policy(network.lineage, settings.license_policy, settings.weights)
    network.eval()
    card = complete_card(network, source_card)
    minimum = smallest(network, form.minimum)
    images = _real_images(settings.images, minimum)
    options = {"opset": settings.opset} if settings.format == "onnx" else {}
    with writing(Path(settings.output)):
        form.write(network.fuse() if settings.fuse else network, card, path, **options)
        if settings.format != "hf":  # hf describes it in preprocessor_config.json
            content = json.dumps(_preprocessing(path, settings.format, network, card), indent=2) + "\n"
            beside(path).write_text(content, encoding="utf-8")
    exported = form.open(path)
    check_parity(network, exported.run, images, minimum, settings.tolerance, settings.format)
    own = sum(parameter.numel() for parameter in network.parameters())
    return (
        f"{exported.parameters:,} {form.counts}; the network has {own:,} parameters\n"
        f"lineage: {describe_lineage(network.lineage)}"
    )


def _check_packages(name: str, form: Format) -> None:
    for package in form.packages:
        if find_spec(package) is None:
            raise UserError(f"format={name} needs the package {package}: pip install 'transkd[export]'")


def _preprocessing(path: Path, format: str, network: Segmenter, card: dict[str, Any]) -> dict[str, Any]:
    """Describe inputs, preprocessing and outputs for programs that run the network."""
    form, stride = FORMATS[format], 4 / network.scale
    return {
        "model": path.name,
        "sha256": sha256(path),
        "format": format,
        "input": {
            "name": "image",
            "layout": "NCHW",
            "dtype": "float32",
            "channels": "RGB",
            "range": [0, 1],
            "minimum_size": [smallest(network, form.minimum)] * 2,
        },
        "normalisation": {"mean": card["mean"], "std": card["std"], "inside_graph": form.normalises},
        "output": {
            "name": "logits",
            "layout": "NCHW",
            "dtype": "float32",
            "stride": int(stride) if stride == int(stride) else stride,
            "then": "upsample bilinearly (align_corners=false) to the image's size, then argmax over the channels",
        },
        "eval_transform": card.get("eval_transform"),
        "class_names": card.get("class_names"),
        "palette": card.get("palette"),
        "lineage": card["lineage"],
    }


def _real_images(pattern: str | None, minimum: int) -> Images:
    """Load a few of the user's images, or a synthetic road scene if none are given."""
    if pattern is None:
        return [("drawn scene", draw_scene(np.random.default_rng(0), 192, 384, "rain")[0])]
    try:
        paths = find_images(pattern).images
    except UserError as error:
        raise UserError(str(error).replace("input=", "images=")) from error
    chosen = paths[:: -(-len(paths) // REAL_IMAGES)]
    return [(path.name, _bounded(read_image(path), minimum)) for path in chosen]


def _bounded(image: Pixels, minimum: int) -> Pixels:
    """Resize an image that is too small for the network or too large for a quick check."""
    height, width = image.shape[:2]
    scale = max(min(1.0, (MOST_PIXELS / (height * width)) ** 0.5), minimum / min(height, width))
    if scale == 1:
        return image
    return np.asarray(Image.fromarray(image).resize((round(width * scale), round(height * scale))))
