"""Self-supervised backbones for timm, made better by SSL++ (Chen et al., IEEE TIP 2022)."""

__version__ = "0.1.0"
