"""Reading of weights from files, folders and hubs: tensors, normalisation, classes, licence."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
from torch import Tensor

from transkd.errors import UserError
from transkd.files import read_tensor_file, tensors_in
from transkd.models.lora import fold_lora
from transkd.models.network import IMAGENET_MEAN, IMAGENET_STD
from transkd.models.storage.card import CARD
from transkd.models.storage.formats import guess_segformer, rename_to_ours
from transkd.models.storage.lineage import CODE, Lineage

__all__ = ["Weights", "read_weights"]

NVIDIA = "NVIDIA Source Code License for SegFormer (non-commercial)"
NVIDIA_NAMING = "SegFormer authors' checkpoint naming"


class Weights(NamedTuple):
    """Weights with their description.

    Attributes:
        source: the source as given by the user, for messages.
        kind: the format: "transkd", "authors", "mit", "mmseg", "huggingface", "smp", "timm" or "unknown".
        tensors: tensors under our names if the format is known, otherwise under their original names.
        original: tensors under the names in the file.
        card: known properties of the network: name, num_classes, mean, std, class_names, …; complete in our files.
        lineage: origins and licences of code and weights.
    """

    source: str
    kind: str
    tensors: dict[str, Tensor]
    original: dict[str, Tensor]
    card: dict[str, Any]
    lineage: Lineage

    @property
    def recipe(self) -> dict[str, Any] | None:
        """Arguments of ``create_segmenter`` that rebuild the network, or None if the file does not contain them."""
        if "recipe" in self.card:
            return self.card["recipe"]
        named: dict[str, Any] = {key: self.card[key] for key in ("name", "num_classes") if key in self.card}
        return named or None


def read_weights(source: str | Path) -> Weights:
    """Read weights from a file, folder or hub; the format is detected from the content.

    Args:
        source: a file (ours, a checkpoint of a run, MiT or SegFormer in the published naming, the TransKD authors',
            segmentation_models.pytorch's, timm's, or any state dict), a folder as ``save_pretrained`` writes it
            (transformers, segmentation_models.pytorch, timm, our export), ``hf://<repository>`` on the Hugging Face
            hub, or ``timm://<model>``. Pickles are read with ``weights_only=True``: no code in them is executed.

    Raises:
        UserError: the source does not exist or is not readable, or the hub cannot be reached.
    """
    source = str(source)
    if source.startswith("timm://"):
        return _read_timm_hub(source, source.removeprefix("timm://"))
    if source.startswith("hf://"):
        return _read_folder(source, _download(source.removeprefix("hf://"), source))
    if Path(source).is_dir():
        return _read_folder(source, Path(source))
    content, metadata = read_tensor_file(source)
    tensors, card = tensors_in(content, source), _card_of(content, metadata, source)
    if card:
        if isinstance(content, Mapping) and "state_dict" in content:  # a run's checkpoint: select the student
            tensors = {k.removeprefix("student."): v for k, v in tensors.items() if k.startswith("student.")}
        tensors = fold_lora(tensors)  # checkpoints store low-rank terms separately, to resume training
        return Weights(source, "transkd", tensors, tensors, card, card.get("lineage", [CODE, _origin(source)]))
    return _recognise(source, tensors)


def _card_of(content: Any, metadata: Mapping[str, str], source: str) -> dict[str, Any]:
    """Return the description in one of our files; empty for other files."""
    try:
        card = json.loads(metadata[CARD]) if CARD in metadata else content.get(CARD, {})
    except json.JSONDecodeError as error:
        raise UserError(f"{source} is a damaged safetensors file ({error}); copy or download it again") from error
    return dict(card)


def _origin(source: str, license: str | None = None) -> dict[str, str | None]:
    return {"part": "weights", "source": source, "license": license}


def _recognise(source: str, tensors: Mapping[str, Tensor], license: str | None = None) -> Weights:
    """Build `Weights` for a file of another library, with the properties that its format implies."""
    kind, renamed = rename_to_ours(tensors)
    name, classes = guess_segformer(renamed)
    if kind == "authors" and classes == 20:  # loading drops the last output, "ignore"
        classes = 19
    card: dict[str, Any] = {"name": name, "num_classes": classes} if name and classes else {}
    origin = _origin(source, license)
    if kind in ("mit", "mmseg", "authors"):
        origin = {"part": "weights", "source": f"{source}, {NVIDIA_NAMING}", "license": license or NVIDIA}
    if kind == "authors":  # their recipe uses RGB in [0, 1] without normalisation
        card |= {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    elif kind in ("mit", "mmseg", "huggingface", "smp"):
        card |= {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    return Weights(source, kind, renamed, dict(tensors), card, [CODE, origin])


def _read_folder(source: str, folder: Path) -> Weights:
    """Read a folder written by ``save_pretrained``: config.json and a weights file."""
    if (folder / "student.safetensors").is_file():  # folder of a run
        return read_weights(folder / "student.safetensors")
    config = _read_json(folder / "config.json")
    if not config:
        raise UserError(f"{source} is not a folder of weights: expected config.json and model.safetensors")
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()]
    if not files:
        raise UserError(f"{source} has a config.json, but neither model.safetensors nor pytorch_model.bin")
    license = _license_of(source, folder, config)
    if "architecture" in config and "pretrained_cfg" in config:
        return _read_timm(source, folder, license)
    content, _ = read_tensor_file(files[0])
    weights = _recognise(source, content, license)
    if weights.kind == "huggingface":
        weights.card.update(_huggingface_card(config, _read_json(folder / "preprocessor_config.json"), weights.card))
    lineage = config.get(CARD, {}).get("lineage", weights.lineage)  # written by our export
    return weights._replace(card={**weights.card, **config.get(CARD, {})}, lineage=lineage)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON ({error}); copy or download it again") from error
    return content if isinstance(content, dict) else {}


def _license_of(source: str, folder: Path, config: dict[str, Any]) -> str | None:
    """Return the licence of the weights in a folder, or None if its files do not state it."""
    if "_model_class" in config:  # segmentation_models.pytorch: its model cards state the library's licence
        from_nvidia = config.get("encoder_weights") and str(config.get("encoder_name")).startswith("mit_")
        return NVIDIA if from_nvidia else None
    if (folder / "README.md").is_file():
        from huggingface_hub import ModelCard

        data = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data
        license = data.license_name if data.license == "other" else data.license
        if license:
            return str(license)
    # NVIDIA's model cards state only "other"
    return NVIDIA if source.startswith(("hf://nvidia/segformer", "hf://nvidia/mit-")) else None


def _huggingface_card(config: dict[str, Any], processor: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Read classes, normalisation and size from transformers' two configuration files."""
    card: dict[str, Any] = {}
    labels = config.get("id2label")
    if known.get("num_classes") and labels and len(labels) == known["num_classes"]:
        card["class_names"] = [labels[key] for key in sorted(labels, key=int)]
    if processor.get("do_normalize", True) and "image_mean" in processor:
        card |= {"mean": processor["image_mean"], "std": processor["image_std"]}
    elif processor:
        card |= {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    size = processor.get("size", {})
    if processor.get("do_resize") and isinstance(size, dict) and {"height", "width"} <= size.keys():
        import albumentations as A

        card["eval_transform"] = A.Resize(size["height"], size["width"]).to_dict()
    return card


def _download(repository: str, source: str) -> Path:
    """Download the required files of a repository on the Hugging Face hub, or use its cache."""
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "preprocessor_config.json", "README.md", "model.safetensors"]
    try:
        folder = Path(snapshot_download(repository, allow_patterns=wanted))
        if not (folder / "model.safetensors").is_file():
            folder = Path(snapshot_download(repository, allow_patterns=[*wanted, "pytorch_model.bin"]))
    except Exception as error:  # includes exceptions of the HTTP library
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"cannot fetch {source} ({type(error).__name__}: {reason}). Is the name right? Without a network, run "
            f"`hf download {repository} --local-dir FOLDER` on a machine that has one, copy FOLDER here and give it "
            "as the weights"
        ) from error
    return folder


def _read_timm_hub(source: str, name: str) -> Weights:
    if not timm.is_model(name.split(".")[0]):
        raise UserError(f"timm has no network {name!r} ({source}); timm.list_models() lists all names")
    cfg = timm.get_pretrained_cfg(name) if timm.is_model_pretrained(name) else None
    if cfg is None or not cfg.hf_hub_id:
        known = ", ".join(timm.list_pretrained(f"{name.split('.')[0]}.*")) or "none"
        raise UserError(f"the hub has no weights of timm's {name!r} ({source}); available: {known}")
    return _read_timm(source, _download(cfg.hf_hub_id, source))


def _read_timm(source: str, folder: Path, license: str | None = None) -> Weights:
    """Read a folder in timm's hub format through timm, which also converts old files."""
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    except Exception as error:  # timm raises many types of exceptions
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"timm cannot load {source}: {reason}. Is the folder complete?") from error
    cfg: Any = model.pretrained_cfg
    card = {"mean": list(cfg["mean"]), "std": list(cfg["std"])}
    tensors = {f"encoder.{name}": tensor for name, tensor in model.state_dict().items()}
    lineage: Lineage = [CODE, _origin(source, license or cfg.get("license"))]
    return Weights(source, "timm", tensors, tensors, card, lineage)
