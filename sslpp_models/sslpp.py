"""Entrypoints: stock architectures of timm with weights made by SSL++ (Chen et al., IEEE TIP 2022).

Each builds one of timm's own architectures with a few keywords set, so that every keyword of timm works on it. Those
ending in `_s32` and `_s64` are made for small images, which they see at about 32 and at 64 px, the others for
photographs. All are headless; ``num_classes=10`` adds a head.
"""

from typing import Any

from safetensors import safe_open
from timm.models import (
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn

from . import weights


def _cfg(name: str, **fields: Any) -> dict[str, Any]:
    return {
        **weights.source(name),
        "num_classes": 0,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "license": "apache-2.0",
        "paper_name": "SSL++: Improving Self-Supervised Learning by Mitigating the Proxy Task-Specificity Problem",
        "paper_ids": "doi:10.1109/TIP.2021.3135470",
        **fields,
    }


_SOURCES = ("file", "state_dict", "hf_hub_id", "url")
_CIFAR10 = {
    "input_size": (3, 32, 32),
    "pool_size": (2, 2),
    "mean": (0.4911, 0.4821, 0.4465),
    "std": (0.2453, 0.2428, 0.2607),
}

# The first tag of an architecture is its default.
default_cfgs = generate_default_cfgs(
    {
        name: _cfg(name, **fields)
        for name, fields in {
            "sslpp_resnet10t_s64.simclr_c10_v2": {
                **_CIFAR10,
                "input_size": (3, 64, 64),
                "test_input_size": (3, 96, 96),
                "first_conv": "conv1.0",
                "classifier": "fc",
            },
            "sslpp_resnet10t_s32.rotation_c10": {
                **_CIFAR10,
                "input_size": (3, 36, 36),
                "test_input_size": (3, 40, 40),
                "first_conv": "conv1.0",
                "classifier": "fc",
            },
            "sslpp_convnext_atto_s64.simclr_c10": {
                **_CIFAR10,
                "input_size": (3, 64, 64),
                "test_input_size": (3, 96, 96),
                "first_conv": "stem.0",
                "classifier": "head.fc",
            },
            "sslpp_tf_efficientnet_lite0.in1k_grocery": {
                "input_size": (3, 128, 128),
                "pool_size": (4, 4),
                "crop_pct": 128 / 147,
                "mean": (0.5, 0.5, 0.5),
                "std": (0.5, 0.5, 0.5),
                "first_conv": "conv_stem",
                "classifier": "classifier",
            },
        }.items()
    }
)


@register_model
def sslpp_resnet10t_s64(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-10 with a deep stem, for small images enlarged to 64 px; 4.9 M parameters."""
    return _create("sslpp_resnet10t_s64", "resnet10t", {}, pretrained, **kwargs)


@register_model
def sslpp_resnet10t_s32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-10 with a deep stem, of half the usual width, for 32 px enlarged to 36; 1.2 M parameters."""
    args = {"channels": (32, 64, 128, 256), "stem_width": 16}
    return _create("sslpp_resnet10t_s32", "resnet10t", args, pretrained, **kwargs)


@register_model
def sslpp_convnext_atto_s64(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ConvNeXt-Atto with 3 x 3 kernels and batch norm, for small images enlarged to 64 px; 3.3 M parameters."""
    args = {"patch_size": 4, "kernel_sizes": 3, "conv_mlp": True, "norm_layer": "batchnorm2d"}
    return _create("sslpp_convnext_atto_s64", "convnext_atto", args, pretrained, **kwargs)


@register_model
def sslpp_tf_efficientnet_lite0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EfficientNet-Lite0, for photographs at 128 px; 3.4 M parameters."""
    return _create("sslpp_tf_efficientnet_lite0", "tf_efficientnet_lite0", {}, pretrained, **kwargs)


def _create(
    name: str,
    base: str,
    args: dict[str, Any],
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """Build timm's `base` with `args`, under the weights of a tag of `name`.

    Args:
        name: of the entrypoint.
        base: architecture of timm.
        args: its keywords, where the caller sets no others.
        pretrained: load the weights.
        pretrained_cfg: tag, or a cfg of the caller's own, as timm.create_model passes it on.
        pretrained_cfg_overlay: fields of the cfg that the caller sets; a source of weights of theirs replaces ours.
        cache_dir: of the Hub's client.

    Raises:
        RuntimeError: there is no such tag.
        weights.WeightsError: the weights are damaged, or do not cover the network.
    """
    known = get_arch_pretrained_cfgs(name)
    if isinstance(pretrained_cfg, str) and f"{name}.{pretrained_cfg}" not in known:
        raise RuntimeError(f"There are no weights {name}.{pretrained_cfg}; there are {', '.join(known)}.")
    overlay = dict(pretrained_cfg_overlay or {})
    theirs = any(overlay.get(source) for source in _SOURCES)
    if theirs:  # and no other, which timm might prefer
        overlay = {**dict.fromkeys(_SOURCES), **overlay}
    # Resolved here: a delegation that leaves it open asks for the weights that timm itself has for `base`.
    cfg = resolve_pretrained_cfg(name, pretrained_cfg, overlay).to_dict()
    args = {**args, **kwargs}
    asked = pretrained and not theirs
    ours = next((tagged for tagged in known if asked and weights.source(tagged).items() <= cfg.items()), None)
    if ours:
        cfg["file"] = str(weights.fetch(ours, cache_dir))
        if kwargs.get("features_only"):  # what it wraps has other names: let timm ask for every weight, and no head
            cfg["num_classes"] = args["num_classes"] = 0
            args.pop("pretrained_strict", None)
    network = model_entrypoint(base)(pretrained=pretrained, pretrained_cfg=cfg, cache_dir=cache_dir, **args)
    if ours and not kwargs.get("features_only"):
        _check_covered(network, ours, cfg)
    # What timm writes when the network is saved: a stock architecture, which loads without this package.
    network.pretrained_cfg["architecture"] = base
    network._model_args = {key: value for key, value in args.items() if key not in ("device", "dtype")}
    return network


def _check_covered(network: nn.Module, name: str, cfg: dict[str, Any]) -> None:
    """Refuse a network with parameters outside its head that the weights lack: timm leaves them random, in silence.

    Raises:
        weights.WeightsError: naming one of them.
    """
    head = get_pretrained_cfg(name).classifier.split(".")[0]  # with what a keyword such as head_hidden_size adds to it
    with safe_open(cfg["file"], framework="pt") as file:
        missing = network.state_dict().keys() - set(file.keys())
    missing = sorted(key for key in missing if not key.startswith(f"{head}."))
    if missing:
        raise weights.WeightsError(
            f"{name} has no weights for {len(missing)} parameters of the network that was asked for, among them "
            f"{missing[0]}; leave out the keyword that adds them, or pretrained=True."
        )
