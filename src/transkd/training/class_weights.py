"""Class weights that a rule gives, as numbers in the configuration."""

import hashlib
import json
import logging
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from transkd.data import SegmentationDataModule
from transkd.data.class_weights import ClassCounts, class_weights, count_classes
from transkd.files import one_at_a_time, write_atomically

__all__ = ["fill_class_weights"]

log = logging.getLogger(__name__)

# settings of the data that change nothing about the labels on disk
INDIFFERENT = {
    "batch_size",
    "eval_batch_size",
    "num_workers",
    "train_transform",
    "eval_transform",
    "protocol",
    "seed",
    "conditions",
    "cache",
    "augment",
    "labelled",
    "unlabelled",
    "unlabelled_share",
}


def fill_class_weights(cfg: DictConfig, data: SegmentationDataModule, folder: Path, progress: bool = False) -> None:
    """Replace each term's ``class_weights`` that is a rule by one number per class, in the configuration itself.

    Args:
        cfg: the whole configuration.
        data: its training labels are counted; they are generated if need be.
        folder: keeps the counts for later runs on the same labels.
        progress: whether to show a bar.

    Raises:
        UserError: the rule is unknown, or a label cannot be read.
    """
    # all rules are read first: one may refer to another
    rules = {name: entry.term.get("class_weights") for name, entry in cfg.criterion.terms.items()}
    ruled = {name: rule for name, rule in rules.items() if isinstance(rule, str)}
    if not ruled:
        return
    with one_at_a_time(folder / ".data.lock"):
        data.generate()
    counts = _kept_counts(cfg, data, folder, progress)
    absent = [name for name, count in zip(data.classes.names, counts.pixels, strict=True) if not count]
    if absent:
        log.warning("no training label has a pixel of %s", ", ".join(absent))
    for name, rule in ruled.items():
        weights = class_weights(rule, counts)
        log.info("%s: class_weights=%s are %s", name, rule, weights)
        cfg.criterion.terms[name].term.class_weights = weights


def _kept_counts(cfg: DictConfig, data: SegmentationDataModule, folder: Path, progress: bool) -> ClassCounts:
    dataset = data.dataset("train")
    path = folder / f"{_fingerprint(cfg, [pair.label for pair in dataset.pairs if pair.label is not None])}.json"
    if path.is_file():
        return ClassCounts(**json.loads(path.read_text(encoding="utf-8")))
    counts = count_classes(dataset, data.num_workers, progress)
    write_atomically(path, (json.dumps(counts._asdict()) + "\n").encode())
    return counts


def _fingerprint(cfg: DictConfig, labels: list[Path]) -> str:
    """Hash of the settings and files that counts depend on."""
    settings = OmegaConf.to_container(cfg.data, resolve=True)
    assert isinstance(settings, dict)
    relevant = {str(key): value for key, value in settings.items() if key not in INDIFFERENT}
    files = [(str(path), (about := path.stat()).st_size, about.st_mtime_ns) for path in labels]
    content = json.dumps([relevant, files], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
