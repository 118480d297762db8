"""How SSL++ backbones are made. Run from a clone (``python -m training``), never installed."""
