"""transkd: small, fast semantic-segmentation transformers by knowledge distillation."""

__version__ = "0.1.0"

__all__ = ["__version__"]
