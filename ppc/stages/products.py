"""The label maps that stages make: what each is called in metrics and files, and which stage writes it."""

from __future__ import annotations

from collections.abc import Collection

from ppc.config import TrialConfig

# Name in metrics (`seed_miou_train`) -> stage and folder of its ID.png.
PRODUCTS: dict[str, tuple[str, str]] = {
    "seed": ("make_seeds", "seeds"),
    "mask": ("refine_crf", "masks"),
    "psa_mask": ("refine_psa", "masks"),
    "irn_mask": ("refine_irn", "masks"),
    "seg": ("predict_seg", "masks"),
}


def products_of(stages: Collection[str]) -> list[str]:
    """The label maps that these stages make, in the order of the pipeline."""
    return [name for name, (stage, _) in PRODUCTS.items() if stage in stages]


def splits_of(product: str, cfg: TrialConfig) -> tuple[str, ...]:
    """The splits for which a trial makes a product."""
    return cfg.segmentation.test.splits if product == "seg" else cfg.seeds.splits
