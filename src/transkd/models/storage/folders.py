"""Reading of folders as ``save_pretrained`` writes them, on the disk or from a hub."""

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import Tensor

from transkd.errors import UserError
from transkd.files import check_archive, check_regular_file, read_tensor_file, tensors_in
from transkd.models.catalog import SEGMENTERS
from transkd.models.encoders.mit import VARIANTS
from transkd.models.storage.card import CARD, HASH, fingerprint, read_card
from transkd.models.storage.lineage import CODE, Lineage
from transkd.models.storage.recognition import NVIDIA, Weights, origin, recognise
from transkd.models.storage.resizing import plain_resize

__all__ = ["read_folder", "read_hub", "read_timm_hub"]

log = logging.getLogger(__name__)

CONFIGS = ("config.json", "preprocessor_config.json", "README.md")
FILES = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"
MOST_JSON = 16 * 2**20


def read_folder(source: str, folder: Path) -> Weights:
    """Read a folder with config.json and weights, in one file or in several with an index.

    Raises:
        UserError: a file is missing or damaged.
    """
    config = _read_json(folder / "config.json")
    if not config:
        raise UserError(f"{source} is not a folder of weights: expected config.json and model.safetensors")
    license = _license_of(source, folder, config)
    file = next((folder / name for name in FILES if os.path.lexists(folder / name)), None)
    index = next((folder / (name + INDEX) for name in FILES if os.path.lexists(folder / (name + INDEX))), None)
    if file is None and index is None:
        raise UserError(f"{source} has a config.json, but neither model.safetensors nor pytorch_model.bin")
    if "architecture" in config and "pretrained_cfg" in config:
        if file is None:
            raise UserError(f"{source}: timm's weights are read from one file; expected model.safetensors")
        check_regular_file(file, "weights file")
        check_archive(file)
        return _read_timm(source, folder, license)
    tensors = (
        _read_file(file, source) if file is not None else _read_shards(folder, _read_json(index or folder), source)
    )
    weights = recognise(source, tensors, license)
    own = read_card(config[CARD], f"{source} (config.json)") if CARD in config else {}  # written by our export
    if weights.kind == "huggingface":
        processor = _read_json(folder / "preprocessor_config.json")
        described = _huggingface_card(config, processor, weights, source)
        weights.card.update(read_card(described, f"{source} (config.json, preprocessor_config.json)"))
        own = _still_true(own, weights.card, bool(processor))
    return weights._replace(card={**weights.card, **own}, lineage=own.get("lineage", weights.lineage))


def _read_file(file: Path, source: str) -> dict[str, Tensor]:
    content, metadata = read_tensor_file(file)
    tensors = tensors_in(content, source)
    if f"{CARD}_{HASH}" in metadata and metadata[f"{CARD}_{HASH}"] != fingerprint(tensors, {}):
        raise UserError(f"{file} is damaged: its tensors differ from its hash; copy or download it again")
    return tensors


def _read_shards(folder: Path, index: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """Read weights that are spread over several files; each tensor must be where the index says."""
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()) or not places:
        raise UserError(f"{source}: the index of its weights has no weight_map of names to files; download it again")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if name in ("", ".", "..") or Path(name).name != name:  # a path out of the folder
            raise UserError(f"{source}: the index of its weights names {name!r}, expected a file of the folder")
        part = tensors_in(read_tensor_file(folder / name)[0], folder / name)
        tensors |= {tensor: part[tensor] for tensor, place in places.items() if place == name and tensor in part}
    missing = [name for name in places if name not in tensors]
    if missing:
        raise UserError(
            f"{source}: {missing[0]} is not in {places[missing[0]]}, where the index says; download it again"
        )
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    if not os.path.lexists(path):
        return {}
    check_regular_file(path, "JSON file")
    try:
        if path.stat().st_size > MOST_JSON:
            raise ValueError(f"{path.stat().st_size} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); copy or download it again") from error
    return content if isinstance(content, dict) else {}


def _license_of(source: str, folder: Path, config: dict[str, Any]) -> str | None:
    """Return the licence of the weights in a folder, or None if its files do not state it."""
    if "_model_class" in config:  # segmentation_models.pytorch: its model cards state the library's licence
        from_nvidia = config.get("encoder_weights") and str(config.get("encoder_name")).startswith("mit_")
        return NVIDIA if from_nvidia else None
    readme = folder / "README.md"
    if readme.is_file() and readme.stat().st_size < MOST_JSON:
        from huggingface_hub import ModelCard

        try:
            data = ModelCard.load(readme, ignore_metadata_errors=True).data
            license = data.license_name if data.license == "other" else data.license
        except Exception as error:  # YAML of strangers; without it the licence is unknown
            log.warning("%s: its README.md states no licence that can be read (%s)", source, type(error).__name__)
            license = None
        if isinstance(license, str) and license:
            return license[:200]
    # NVIDIA's model cards state only "other"
    return NVIDIA if source.startswith(("hf://nvidia/segformer", "hf://nvidia/mit-")) else None


def _huggingface_card(
    config: dict[str, Any], processor: dict[str, Any], weights: Weights, source: str
) -> dict[str, Any]:
    """Read classes, sizes, normalisation and resizing from transformers' two configuration files."""
    card: dict[str, Any] = {}
    classifier = weights.tensors.get("head.linear_pred.weight")
    labels = config.get("id2label")
    if classifier is not None:
        card |= _segformer(config, len(classifier), source)
        if isinstance(labels, dict) and set(labels) == {str(i) for i in range(len(classifier))}:
            card["class_names"] = [labels[str(i)] for i in range(len(classifier))]
    if processor.get("do_normalize", True) and "image_mean" in processor:
        card |= {"mean": processor["image_mean"], "std": processor.get("image_std")}
    elif processor:
        card |= {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    factor = processor.get("rescale_factor", 1 / 255)
    if not (isinstance(factor, float) and math.isclose(factor, 1 / 255, rel_tol=1e-3)):
        raise UserError(f"{source}: preprocessor_config.json has rescale_factor={factor!r}, expected 1/255")
    if processor.get("do_resize"):
        card["eval_transform"] = _resize(processor.get("size", 512), source)  # transformers' default
    return card


def _still_true(own: Mapping[str, Any], stated: Mapping[str, Any], processed: bool) -> dict[str, Any]:
    """What our export's card says and transformers' files do not contradict: it stays in folders that they write again.

    Args:
        own: the card.
        stated: what config.json, the tensors and preprocessor_config.json say.
        processed: whether there is a preprocessor_config.json.
    """
    card, classes = dict(own), stated.get("num_classes")
    names = own.get("class_names") or [f"class {i}" for i in range(own.get("num_classes") or 0)]
    if (
        classes
        and "num_classes" in own
        and (classes != own["num_classes"] or stated.get("class_names", names) != names)
    ):
        card = {key: value for key, value in card.items() if key not in ("class_names", "palette")}
        card["num_classes"] = classes
        if card.get("recipe") is not None:
            card["recipe"] = {**card["recipe"], "num_classes": classes}
    if processed:
        size, ours = (plain_resize(part.get("eval_transform")) for part in (stated, own))
        dropped = {"mean", "std"} | ({"eval_transform"} if size != ours else set())
        card = {key: value for key, value in card.items() if key not in dropped}
    return card


def _segformer(config: dict[str, Any], classes: int, source: str) -> dict[str, Any]:
    """Name of the SegFormer that a config.json describes, with its sizes where they are of no published one."""
    sizes = [config.get(key) for key in ("hidden_sizes", "depths", "num_attention_heads", "sr_ratios", "mlp_ratios")]
    width = config.get("decoder_hidden_size")
    lists = [size for size in sizes if isinstance(size, list) and len(size) == 4]
    if len(lists) < len(sizes):
        return {}  # recognised by the shapes alone
    channels, depths, heads, reductions, ratios = lists
    if len(set(map(str, ratios))) > 1 or config.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{source}: a SegFormer with mlp_ratios={ratios} and hidden_act={config.get('hidden_act')}; "
                        "expected one ratio for all stages, and gelu")  # fmt: skip
    published = next((n for n, v in VARIANTS.items() if [*map(list, v.values())] == [channels, depths]), None)
    name = next((name for name, recipe in SEGMENTERS.items() if recipe.encoder == published), "segformer_b0")
    own: dict[str, Any] = {}
    if published is None:
        own = {"channels": channels, "depths": depths}
    if [heads, reductions, ratios[0]] != [[1, 2, 5, 8], [8, 4, 2, 1], 4]:
        own |= {"heads": heads, "reductions": reductions, "mlp_ratio": ratios[0]}
    recipe: dict[str, Any] = {"name": name, "num_classes": classes}
    if own:
        recipe["encoder"] = own
    if width not in (None, SEGMENTERS[name].width):
        recipe["width"] = width
    return {"name": name, "num_classes": classes, **({"recipe": recipe} if len(recipe) > 2 else {})}


def _resize(size: Any, source: str) -> dict[str, Any]:
    """Albumentations' resize for a processor's ``size``; a single number is a square, as in transformers."""
    values = {"height": size, "width": size} if isinstance(size, int) else size
    found = {}
    if isinstance(values, dict):
        found = {key: value for key, value in values.items() if type(value) is int and 1 <= value <= 16384}
    import albumentations as A

    if {"height", "width"} <= found.keys():
        return A.Resize(found["height"], found["width"]).to_dict()
    if "shortest_edge" in found and "longest_edge" not in found:
        return A.SmallestMaxSize(found["shortest_edge"]).to_dict()
    raise UserError(
        f"{source}: preprocessor_config.json resizes to size={size!r}; expected a number, height and width, or "
        "shortest_edge"
    )


# Hubs


def read_hub(source: str, repository: str) -> Weights:
    """Download a repository of the Hugging Face hub, or use the cache, and read it."""
    return read_folder(source, _download(repository, source))


def _download(repository: str, source: str) -> Path:
    from huggingface_hub import snapshot_download

    safe = ["model.safetensors", f"model.safetensors{INDEX}", "model-*-of-*.safetensors"]
    pickled = ["pytorch_model.bin", f"pytorch_model.bin{INDEX}", "pytorch_model-*-of-*.bin"]
    try:
        folder = Path(snapshot_download(repository, allow_patterns=[*CONFIGS, *safe]))
        if not any((folder / name).is_file() for name in safe[:2]):
            folder = Path(snapshot_download(repository, allow_patterns=[*CONFIGS, *pickled]))
    except Exception as error:  # includes exceptions of the HTTP library
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"cannot fetch {source} ({type(error).__name__}: {reason}). Is the name right? Without a network, run "
            f"`hf download {repository} --local-dir FOLDER` on a machine that has one, copy FOLDER here and give it "
            "as the weights"
        ) from error
    return folder


def read_timm_hub(source: str, name: str) -> Weights:
    """Download the weights of one of timm's networks, or use the cache, and read them."""
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
    described = {key: list(cfg[key]) for key in ("mean", "std") if isinstance(cfg.get(key), list | tuple)}
    stated = license or cfg.get("license")
    tensors = {f"encoder.{name}": tensor for name, tensor in model.state_dict().items()}
    lineage: Lineage = [CODE, origin(source, stated if isinstance(stated, str) else None)]
    return Weights(source, "timm", tensors, tensors, read_card(described, f"{source} (config.json)"), lineage)
