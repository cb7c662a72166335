"""Conversion of tensor names between weight formats: detects the format of a file, renames to ours and back."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from transkd.models.catalog import SEGMENTERS
from transkd.models.encoders.mit import VARIANTS
from transkd.models.storage.transkd_checkpoint import split_transkd_checkpoint

__all__ = ["guess_segformer", "looks_like", "rename_to_huggingface", "rename_to_ours", "without_wrappers"]

StateDict = dict[str, Tensor]
STAGES = 4


def rename_to_ours(tensors: Mapping[str, Tensor]) -> tuple[str, StateDict]:
    """Detect a file's format by its tensor names and rename the tensors.

    Args:
        tensors: tensors as in the file.

    Returns:
        The format ("transkd", "authors", "mit", "mmseg", "huggingface", "smp" or "unknown") and the tensors under our
        names, not renamed if the format is unknown.

    Example:
        >>> kind, ours = rename_to_ours({"segformer.encoder.layer_norm.0.weight": torch.ones(32)})
        >>> kind, list(ours)
        ('huggingface', ['encoder.norm1.weight'])
    """
    plain = _as_stored(without_wrappers(tensors))
    names = set(plain)
    if "student.patch_embed1.proj.weight" in names:  # distillation checkpoint of the TransKD authors
        return "authors", split_transkd_checkpoint(plain)["student"]
    if "patch_embed1.proj.weight" in names:  # MiT encoder (ImageNet, with its classifier) or complete SegFormer
        plain = {name: tensor for name, tensor in plain.items() if not name.startswith("head.")}
        return "mit", split_transkd_checkpoint({f"student.{name}": plain[name] for name in plain})["student"]
    if "backbone.patch_embed1.proj.weight" in names:  # complete networks of the SegFormer authors (mmsegmentation)
        return "mmseg", _replace_prefixes(plain, MMSEG)
    if any(re.match(r"(segformer\.)?encoder\.(patch_embeddings|layer_norm|block)\.\d", name) for name in names):
        return "huggingface", _from_huggingface(plain)
    if "decoder.mlp_stage.0.linear.weight" in names:
        return "smp", _replace_prefixes(plain, SMP)
    ours = names and all(name.startswith(("encoder.", "head.")) for name in names)
    return ("transkd" if ours else "unknown"), plain


def without_wrappers(tensors: Mapping[str, Tensor]) -> StateDict:
    """Remove what wrappers add to the names: ``module.``, ``_orig_mod.`` of torch.compile, a ``model.`` common to all.

    Example:
        >>> list(without_wrappers({"model._orig_mod.head.bias": torch.zeros(1), "model.encoder.weight": torch.ones(1)}))
        ['head.bias', 'encoder.weight']
    """
    plain = {re.sub(r"(^|(?<=\.))_orig_mod\.", "", name): tensor for name, tensor in tensors.items()}
    while any(name.startswith("module.") for name in plain):
        plain = {name.removeprefix("module."): tensor for name, tensor in plain.items()}
    if plain and all(name.startswith("model.") for name in plain):
        return without_wrappers({name.removeprefix("model."): tensor for name, tensor in plain.items()})
    return plain


# transformers 5 has other module names than it saves: those of a state dict in memory, and those in files
AS_STORED = (
    (r"^(segformer\.)?stages\.(\d)\.patch_embeddings\.", r"\1encoder.patch_embeddings.\2."),
    (r"^(segformer\.)?stages\.(\d)\.layer_norm\.", r"\1encoder.layer_norm.\2."),
    (r"^(segformer\.)?stages\.(\d)\.blocks\.", r"\1encoder.block.\2."),
    (r"^decode_head\.linear_projections\.", "decode_head.linear_c."),
    (r"\.layernorm_before\.", ".layer_norm_1."),
    (r"\.layernorm_after\.", ".layer_norm_2."),
    (r"\.attention\.q_proj\.", ".attention.self.query."),
    (r"\.attention\.k_proj\.", ".attention.self.key."),
    (r"\.attention\.v_proj\.", ".attention.self.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.attention\.sequence_reduction\.sequence_reduction\.", ".attention.self.sr."),
    (r"\.attention\.sequence_reduction\.layer_norm\.", ".attention.self.layer_norm."),
    (r"\.mlp\.fc(\d)\.", r".mlp.dense\1."),
)


def _as_stored(tensors: StateDict) -> StateDict:
    """Rename the tensors of a SegFormer in transformers' memory as it saves them."""
    if not any(re.match(r"(segformer\.)?stages\.\d\.blocks\.\d+\.attention\.q_proj\.", name) for name in tensors):
        return tensors
    stored = {}
    for name, tensor in tensors.items():
        for pattern, replacement in AS_STORED:
            name = re.sub(pattern, replacement, name)
        stored[name] = tensor
    return stored


MMSEG = {
    "backbone.": "encoder.",
    "decode_head.conv_seg.": None,  # unused layer of mmsegmentation's base class
    "decode_head.": "head.",
}
# segmentation_models.pytorch; its list of linear layers starts with the deepest stage
SMP = {
    "encoder.": "encoder.",
    **{f"decoder.mlp_stage.{STAGES - i}.linear.": f"head.linear_c{i}.proj." for i in range(1, STAGES + 1)},
    "decoder.fuse_stage.0.": "head.linear_fuse.conv.",
    "decoder.fuse_stage.1.": "head.linear_fuse.bn.",
    "segmentation_head.0.": "head.linear_pred.",
}


def _replace_prefixes(tensors: StateDict, prefixes: Mapping[str, str | None]) -> StateDict:
    renamed = {}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        replacement = prefixes.get(prefix, "")
        if replacement is not None:
            renamed[replacement + name[len(prefix) :]] = tensor
    return _with_batch_counter(renamed)


def _with_batch_counter(tensors: StateDict) -> StateDict:
    """Add BatchNorm's batch counter, which some libraries do not save; it does not affect results."""
    if "head.linear_fuse.bn.running_mean" in tensors:
        tensors.setdefault("head.linear_fuse.bn.num_batches_tracked", torch.tensor(0))
    return tensors


def _huggingface_modules(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Map our module names to those of transformers' SegFormer, for the blocks in ``tensors``."""
    names = {"head.linear_fuse.conv": "decode_head.linear_fuse", "head.linear_fuse.bn": "decode_head.batch_norm"}
    names["head.linear_pred"] = "decode_head.classifier"
    block = re.compile(r"(?:encoder\.block|segformer\.encoder\.block\.|encoder\.block\.)(\d+)\.(\d+)\.")
    deepest = max((int(match[2]) for name in tensors if (match := block.match(name))), default=-1)
    for i in range(1, STAGES + 1):
        theirs = f"segformer.encoder.block.{i - 1}"
        names[f"encoder.patch_embed{i}.proj"] = f"segformer.encoder.patch_embeddings.{i - 1}.proj"
        names[f"encoder.patch_embed{i}.norm"] = f"segformer.encoder.patch_embeddings.{i - 1}.layer_norm"
        names[f"encoder.norm{i}"] = f"segformer.encoder.layer_norm.{i - 1}"
        names[f"head.linear_c{i}.proj"] = f"decode_head.linear_c.{i - 1}.proj"
        for j in range(deepest + 1):
            for ours, layer in HUGGINGFACE_BLOCK.items():
                names[f"encoder.block{i}.{j}.{ours}"] = f"{theirs}.{j}.{layer}"
    return names


HUGGINGFACE_BLOCK = {
    "norm1": "layer_norm_1",
    "attn.q": "attention.self.query",
    "attn.k": "attention.self.key",  # ours fuses key and value as attn.kv
    "attn.v": "attention.self.value",
    "attn.sr": "attention.self.sr",
    "attn.norm": "attention.self.layer_norm",
    "attn.proj": "attention.output.dense",
    "norm2": "layer_norm_2",
    "mlp.fc1": "mlp.dense1",
    "mlp.dwconv.dwconv": "mlp.dwconv.dwconv",
    "mlp.fc2": "mlp.dense2",
}


def _from_huggingface(tensors: StateDict) -> StateDict:
    # names start with encoder.… in an encoder's file, segformer.encoder.… in a classifier's or segmenter's
    full = {f"segformer.{name}" if name.startswith("encoder.") else name: tensor for name, tensor in tensors.items()}
    full = {name: tensor for name, tensor in full.items() if not name.startswith("classifier.")}  # ImageNet classifier
    ours = {theirs: name for name, theirs in _huggingface_modules(full).items()}
    renamed = {}
    for name, tensor in full.items():
        module, leaf = name.rsplit(".", 1)
        renamed[f"{ours.get(module, module)}.{leaf}"] = tensor
    for name in [name for name in renamed if ".attn.k." in name]:
        value = name.replace(".attn.k.", ".attn.v.")
        if value in renamed:
            renamed[name.replace(".attn.k.", ".attn.kv.")] = torch.cat([renamed.pop(name), renamed.pop(value)])
    return _with_batch_counter(renamed)


def rename_to_huggingface(tensors: Mapping[str, Tensor]) -> StateDict:
    """Rename the tensors of our SegFormer to the names of transformers.

    Example:
        >>> list(rename_to_huggingface({"head.linear_c1.proj.bias": torch.zeros(4)}))
        ['decode_head.linear_c.0.proj.bias']
    """
    split: StateDict = {}
    for name, tensor in tensors.items():
        if ".attn.kv." in name:
            split[name.replace(".kv.", ".k.")], split[name.replace(".kv.", ".v.")] = tensor.chunk(2)
        else:
            split[name] = tensor
    theirs = _huggingface_modules(split)
    renamed = {}
    for name, tensor in split.items():
        module, leaf = name.rsplit(".", 1)
        renamed[f"{theirs[module]}.{leaf}"] = tensor
    return renamed


def guess_segformer(tensors: Mapping[str, Tensor]) -> tuple[str | None, int | None]:
    """Infer the name and number of classes of a SegFormer from tensors under our names, None where unknown."""
    channels, depths = [], []
    for i in range(1, STAGES + 1):
        projection = tensors.get(f"encoder.patch_embed{i}.proj.weight")
        channels.append(_rows(projection) or 0)
        depths.append(len({name.split(".")[2] for name in tensors if name.startswith(f"encoder.block{i}.")}))
    encoders = {(sizes["channels"], sizes["depths"]): name for name, sizes in VARIANTS.items()}
    encoder = encoders.get((tuple(channels), tuple(depths)))
    name = next((name for name, recipe in SEGMENTERS.items() if recipe.encoder == encoder), None)
    return name, _rows(tensors.get("head.linear_pred.weight"))


def _rows(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.ndim == 0 else len(tensor)


# Parts of tensor names that identify the kind of network in a file of another library.
SIGNATURES = (
    ("transformer.resblocks.", "a CLIP network"),
    ("sem_seg_head.", "a Mask2Former"),
    ("relative_position_bias_table", "a Swin transformer"),
    ("cls_token", "a plain vision transformer (ViT)"),
    ("stages.0.blocks.0.conv_dw.", "a timm ConvNeXt"),
    ("pwconv1.", "a ConvNeXt"),
    ("classifier.0.convs.0.0.weight", "a torchvision DeepLabV3"),
    ("layer1.0.conv1.weight", "a ResNet"),
    ("layer4.", "a ResNet"),
    ("features.0.", "a torchvision network (MobileNet, VGG, …)"),
    ("stages.0.blocks.0.attn.kv.", "a timm PVTv2"),
    ("decode_head.", "a network of mmsegmentation"),
    ("segmentation_head.", "a network of segmentation_models.pytorch"),
)


def looks_like(tensors: Mapping[str, Tensor]) -> str | None:
    """Describe the network that tensors seem to belong to, for messages; None if it is not recognised.

    Example:
        >>> looks_like({"layer1.0.conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)})
        'a ResNet'
    """
    name, classes = guess_segformer(tensors)
    if name is not None:
        return f"{name} with {classes} classes" if classes else f"the encoder of {name}"
    return next((what for mark, what in SIGNATURES if any(mark in name for name in tensors)), None)
