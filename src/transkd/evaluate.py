"""Score a network: ``python -m transkd.evaluate weights=student.safetensors +experiment=acdc protocol=full-res``."""

from typing import TYPE_CHECKING

from transkd.cli import hydra_command

if TYPE_CHECKING:
    from omegaconf import DictConfig


def evaluate(cfg: "DictConfig") -> None:
    """Score one file of weights on the validation split; prints the table and writes ``results.json``."""
    from pathlib import Path

    from hydra.utils import instantiate

    from transkd.errors import UserError
    from transkd.models import load_segmenter, load_weights
    from transkd.models.storage.sources import read_weights
    from transkd.report import describe_scores, print_scores, sha256, versions, write_results
    from transkd.run import quiet_lightning, score
    from transkd.training.memory import keep_freed_memory

    quiet_lightning()
    if cfg.keep_freed_memory:
        keep_freed_memory()
    data = instantiate(cfg.data)
    weights = read_weights(cfg.weights)
    if weights.recipe is not None:
        network, _ = load_segmenter(weights)
    else:
        network = instantiate(cfg.student.network)
        load_weights(network, weights)
    if network.num_classes != data.num_classes:
        raise UserError(
            f"{cfg.weights} has {network.num_classes} classes, the data {cfg.name} has {data.num_classes}; "
            "choose the experiment that it was trained on"
        )
    data.prepare_data()
    scores = score(cfg, network, data)
    results = {
        **describe_scores(scores, cfg.protocol, data.classes.names),
        "weights": str(cfg.weights),
        "sha256": sha256(Path(cfg.weights)),
        "versions": versions(),
    }
    write_results(results, Path(cfg.run_dir))
    print_scores({"network": scores}, data.classes.names, cfg.protocol)


@hydra_command("evaluate")
def main(cfg: "DictConfig") -> None:
    """Compose, then evaluate; heavy imports come only once the configuration stands."""
    evaluate(cfg)


if __name__ == "__main__":
    main()
