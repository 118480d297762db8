"""What we need of any timm model: stages, features, low and high, a fresh high part, saving. No layer by name."""

import dataclasses
import difflib
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file
from timm.models import get_model_args, get_model_input_config
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import sslpp_models as sslpp_models  # registers the entrypoints

from .extraction import features, plain_batch
from .files import Failed, Refused, full_disk, read_json, reading, reason, save_tensors, sha256_file
from .images import Images
from .recipe import Model

FILES = ("config.json", "model.safetensors")  # of a saved backbone
WHITE = "white "  # begins the note of a pretrained_cfg that tells what more than 8 bits were scaled by
WHITE_NOTE = re.compile(r"white \d+(\.\d+)?(e\+\d+)?|(?!white ).*", re.DOTALL)
LARGEST_CROP = 2  # no weights of timm were trained with a crop_pct above 1.15


def create(model: Model, size: int | None, pretrained: bool | None = None, head: bool = False) -> nn.Module:
    """Build the recipe's backbone for square images of `size` px.

    Args:
        model: the recipe's network.
        size: working size, px, passed on as img_size to networks that are built for one size; None: the network's own.
        pretrained: load weights; the recipe's choice if None.
        head: keep the classifier that the weights have; a backbone has none.

    Raises:
        Refused: timm cannot build it, or it does not tell its stages or take such images.
        Failed: its weights cannot be kept.
    """
    pretrained = model.pretrained if pretrained is None else pretrained
    _check_config(model.name)
    args = model.args if head else {**model.args, "num_classes": 0}
    try:
        network = timm.create_model(model.name, pretrained=pretrained, **args)
        wants = get_model_input_config(network)
        size = size or wants["input_size"][-1]
        if wants["fixed_input_size"] and wants["input_size"][-1] != size and "img_size" not in args:
            network = timm.create_model(model.name, pretrained=pretrained, img_size=size, **args)
    except Exception as error:  # timm and the Hub's client raise nearly every type for what a user mistyped
        if full := full_disk(error):
            raise Failed(f"the weights of {model.name} cannot be kept on this disk: {reason(full)}.") from error
        raise Refused(_why_not(model, error)) from error
    if not hasattr(network, "forward_intermediates") or not hasattr(network, "feature_info"):
        raise Refused(f"model.name: {model.name} has no forward_intermediates, so its stages cannot be told.")
    try:
        with torch.no_grad():
            pooled = features(network.eval(), torch.zeros(1, 3, size, size), stage_list(network))["pooled"]
    except Exception as error:
        why = str(error) or type(error).__name__
        raise Refused(f"model.name: {model.name} does not take images of data.size {size}: {why}") from error
    if not head and pooled.ndim != 2:
        raise Refused(
            f"model.args: so {model.name} gives {list(pooled.shape[1:])} for an image, not one feature vector."
        )
    _check_told(network, model.name)
    if pretrained and (odd := next((n for n, p in network.named_parameters() if not p.isfinite().all()), None)):
        raise Refused(f"model.name: the weights of {model.name} are damaged: {odd} is not finite.")
    return network


def _check_config(name: str) -> None:
    """Refuse a folder whose config.json is no model's; of one without any, timm says so.

    Raises:
        Refused: naming the file.
    """
    path = Path(name.removeprefix("local-dir:")) / "config.json"
    if not name.startswith("local-dir:") or not path.exists():
        return
    try:
        read_json(path, "architecture")
    except (Failed, OSError) as error:
        raise Refused(f"model.name: {path} names no architecture, so that timm could not load it.") from error


def _check_told(network: nn.Module, name: str) -> None:
    """Refuse a model that tells of its images or classes what cannot be, so that its answers would mean nothing.

    Raises:
        Refused: naming the entry of its config.
    """
    told, names = network.pretrained_cfg, network.pretrained_cfg.get("label_names")
    notes, mean, std, crop_pct = (told.get(entry) for entry in ("notes", "mean", "std", "crop_pct"))
    right = {
        "mean": _numbers(mean, 3),
        "std": _numbers(std, 3) and min(std) > 0,
        "crop_pct": _numbers([crop_pct], 1) and 0 < crop_pct <= LARGEST_CROP,
        "notes": not notes or (_texts(notes) and all(re.fullmatch(WHITE_NOTE, n) for n in notes)),
        "label_names": not (network.num_classes and names) or (_texts(names) and len(names) == network.num_classes),
    }
    if wrong := [entry for entry, well in right.items() if not well]:
        raise Refused(f"model.name: the config of {name} is damaged: {wrong[0]} cannot be {told.get(wrong[0])!r:.60}.")


def _texts(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, str) for value in values)


def _numbers(values: Any, count: int) -> bool:
    """Whether these are so many finite numbers."""
    listed = isinstance(values, list | tuple) and len(values) == count
    return listed and all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def _why_not(model: Model, error: Exception) -> str:
    text = reason(error)
    if unknown := re.search(r"Unknown model \((.+)\)", text):
        name = unknown.group(1)
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        named = f"{model.name}: timm has no model {name!r}" if name not in model.name else f"timm has no model {name!r}"
        return f"model.name: {named}" + (f"; did you mean {', '.join(near)}?" if near else ".")
    field = "model.args" if isinstance(error, TypeError) else "model.name"
    given = f" with {model.args}" if model.args else ""
    return f"{field}: timm cannot build {model.name}{given}: {text}"


def white_of(network: nn.Module) -> float | None:
    """What of more than 8 bits was white where a saved backbone was trained; None if nothing had more."""
    notes = network.pretrained_cfg.get("notes") or ()
    return next((float(note.removeprefix(WHITE)) for note in notes if note.startswith(WHITE)), None)


def as_seen_by(network: nn.Module, images: Images, own_crop: bool = False) -> Images:
    """The images with the statistics and crop that a pretrained network expects; `own_crop` keeps the images'.

    Of pictures larger than what is stored, the images' own crop alone is what timm's transform shows, to the pixel.
    """
    source = network.pretrained_cfg
    return dataclasses.replace(
        images,
        mean=tuple(source["mean"]),
        std=tuple(source["std"]),
        crop_pct=images.crop_pct if own_crop else source["crop_pct"],
    )


def stage_list(network: nn.Module) -> list[int]:
    """Indices of the network's stages."""
    return list(range(len(network.feature_info)))


def resolve_stage(network: nn.Module, stage: int, field: str) -> int:
    """A stage, negative ones counted from the end, as its index.

    Raises:
        Refused: there is no such stage, naming `field`.
    """
    count = len(stage_list(network))
    if not -count <= stage < count:
        raise Refused(f"{field}: {stage} is not one of the {count} stages, 0 to {count - 1} or -{count} to -1.")
    return stage % count


def unite_norms(module: nn.Module) -> None:
    """Give every process the main one's statistics of batch norms: each one's have seen other images."""
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            for buffer in norm.buffers():
                broadcast(buffer)


def low_names(network: nn.Module, stage: int, size: int) -> set[str]:
    """Names of the parameters and buffers that a stage's features depend on: the low part of a split there.

    Autograd tells: a parameter is low if the feature has a gradient with respect to it. Buffers go with the parameters
    of their module; those of a module without parameters go with its output.
    """
    outputs: dict[str, Tensor] = {}

    def remember(name: str) -> Callable:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                outputs[name] = output

        return hook

    own = {name: [p for p, _ in module.named_parameters(recurse=False)] for name, module in network.named_modules()}
    hooks = [m.register_forward_hook(remember(n)) for n, m in network.named_modules() if not own[n] and _buffers(m)]
    frozen = [p for p in network.parameters() if not p.requires_grad]
    mode, device = network.training, next(network.parameters()).device
    network.eval().requires_grad_(True)
    try:
        with torch.enable_grad():
            image = torch.randn(1, 3, size, size, device=device, requires_grad=True)
            feature = features(network, image, [stage])[stage].sum()
            parameters = dict(network.named_parameters())
            asked = [*parameters.values(), *outputs.values()]
            gradients = torch.autograd.grad(feature, asked, allow_unused=True)
    finally:
        network.train(mode)
        for parameter in frozen:
            parameter.requires_grad_(False)
        for hook in hooks:
            hook.remove()
    told = [gradient is not None for gradient in gradients]
    low = {name for name, yes in zip(parameters, told, strict=False) if yes}
    low_modules = {name for name, yes in zip(outputs, told[len(parameters) :], strict=True) if yes}
    for name, module in network.named_modules():
        prefix = f"{name}." if name else ""
        if name in low_modules or any(prefix + p in low for p in own[name]):
            low |= {prefix + buffer for buffer in _buffers(module)}
    return low


def _buffers(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_buffers(recurse=False)]


@torch.no_grad()
def reinit(network: nn.Module, names: Iterable[str], fresh: nn.Module, keep: float = 0.0) -> None:
    """Copy the named parameters and buffers from a newly created network, as timm's constructors initialise them.

    Args:
        network: is changed.
        names: of what is copied.
        fresh: the new network.
        keep: share of the old values that stays (shrink and perturb; Ash & Adams, NeurIPS 2020).
    """
    source = dict(fresh.named_parameters()) | dict(fresh.named_buffers())
    target = dict(network.named_parameters()) | dict(network.named_buffers())
    for name in names:
        if keep and target[name].is_floating_point():
            target[name].lerp_(source[name].to(target[name]), 1 - keep)
        else:
            target[name].copy_(source[name])


def set_frozen_mode(network: nn.Module, names: set[str], low_norm: str) -> None:
    """Put the modules all of whose parameters and buffers are in a frozen low part into evaluation mode, and what lies
    in them, such as dropout; batch norms as `low_norm` says."""
    for name, module in network.named_modules():
        prefix = f"{name}." if name else ""
        own = {prefix + n for n, _ in (*module.named_parameters(), *module.named_buffers())}
        if own and own <= names:
            for part in module.modules():
                part.training = isinstance(part, _BatchNorm) and low_norm == "train"


@torch.no_grad()
def estimate_norm(network: nn.Module, images: Images, device: torch.device, batch_size: int, most: int = 5000) -> None:
    """Set batch norms' statistics to averages over un-augmented training images, as an untrained network needs."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
        norm.train()
    for part in images.sample(images.train, most).split(max(2, batch_size)):
        if len(part) > 1:
            network(plain_batch(images, part, device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()


def save(network: nn.Module, folder: Path, images: Images, tag: str = "", license: str = "", **config: Any) -> str:
    """Write a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` and transformers load.

    Args:
        network: a timm model, as create_model built it.
        folder: an existing folder; gets config.json and model.safetensors.
        images: whose size, statistics and crop the model was trained with.
        tag: the weights' tag, e.g. rotation_c10.
        license: of the weights, as the Hub names it.
        config: further entries of config.json, e.g. label_names.

    Returns:
        sha256 of model.safetensors.
    """
    source, expects = network.pretrained_cfg, get_model_input_config(network)
    # transformers passes num_classes itself and chokes on a second one; timm fills it from the entry above it.
    args = {k: v for k, v in get_model_args(network).items() if k != "num_classes" and (k, v) != ("in_chans", 3)}
    pretrained_cfg = {
        "tag": tag,
        "input_size": [3, images.size, images.size],
        "fixed_input_size": bool(expects["fixed_input_size"]),
        "pool_size": None,
        "interpolation": "bilinear",
        "crop_pct": images.crop_pct,
        "crop_mode": "center",
        "mean": list(images.mean),
        "std": list(images.std),
        "num_classes": network.num_classes,
        "first_conv": expects["first_conv"],
        "classifier": source.get("classifier"),
        "license": license or None,
        "notes": [f"{WHITE}{images.white:g}"] if images.white else None,
    }
    description = {
        "architecture": source["architecture"],
        "num_classes": network.num_classes,
        "num_features": network.num_features,
        "model_args": args,
        "pretrained_cfg": {key: value for key, value in pretrained_cfg.items() if value not in (None, "")},
        **config,
    }
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    state = {name: value.detach().cpu().contiguous().clone() for name, value in network.state_dict().items()}
    save_tensors(state, folder / "model.safetensors", {"format": "pt"})
    return sha256_file(folder / "model.safetensors")


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and contents of tensors, such as a state_dict."""
    digest = hashlib.sha256()
    for name, value in tensors.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load(folder: Path) -> nn.Module:
    """A saved model as it is, every weight of which was found: a headless one without a head, a classifier with its.

    Raises:
        Failed: it is no longer what was written.
    """
    with reading(folder):
        # The weights by ourselves: timm would first have some networks fetch those of a part of theirs.
        network = timm.create_model(f"local-dir:{folder}", pretrained=False)
        network.load_state_dict(load_file(folder / "model.safetensors"))
        return network
