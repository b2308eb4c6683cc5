"""ppc: Ray-distributed experiments and ablations for weakly supervised segmentation by pixel-to-prototype contrast."""

__version__ = "0.1.0"
