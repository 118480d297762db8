"""Checkpoints: folders renamed into place, the last two kept, safetensors and JSON, checked by sha256 when read."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .files import Failed, Refused, read_json, save_tensors, sha256_file, sha256_json, whole_folder, write_json
from .markers import first_difference

KEPT = 2


@dataclass
class Checkpoint:
    """A state read back.

    Attributes:
        tensors: the task's state under "task/", the optimiser's under "optimizer/" and "group/".
        state: step, budget, and what of the optimiser is no tensor.
    """

    tensors: dict[str, Tensor]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]

    def load_task(self, task: nn.Module) -> None:
        prefix = "task/"
        task.load_state_dict({k[len(prefix) :]: v for k, v in self.tensors.items() if k.startswith(prefix)})

    def load_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Any]] = {}
        for key, value in self.tensors.items():
            if key.startswith("optimizer/"):
                _, number, name = key.split("/", 2)
                like = parameters[int(number)]
                # In the parameter's memory format, as the optimiser itself had made it.
                value = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
                state.setdefault(int(number), {})[name] = value
        for number, values in self.state["optimizer"].items():
            state.setdefault(int(number), {}).update(values)
        groups = optimizer.state_dict()["param_groups"]
        for group, kept in zip(groups, self.state.get("groups", [{}] * len(groups)), strict=True):
            group |= kept
        for key, value in self.tensors.items():
            if key.startswith("group/"):
                _, number, name = key.split("/", 2)
                groups[int(number)][name] = value.clone()
        optimizer.load_state_dict({"state": state, "param_groups": groups})


@dataclass(frozen=True)
class Earlier:
    """A finished schedule that another goes on from.

    Attributes:
        step: its last.
        fingerprint: of its checkpoints.
    """

    step: int
    fingerprint: str


def counted(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What an optimiser itself keeps in its groups, as steps, beside the settings that they were made with."""
    given = {"params", "lr_scale", *optimizer.defaults}
    return [{key: value for key, value in group.items() if key not in given} for group in optimizer.param_groups]


def can_be_kept(optimizer: torch.optim.Optimizer) -> bool:
    """Whether tensors and JSON hold all that an optimiser, which has done a step, keeps."""
    found = [value for kept in (*optimizer.state.values(), *counted(optimizer)) for value in kept.values()]
    try:
        return bool(sha256_json([value for value in found if not isinstance(value, Tensor)]))
    except TypeError:
        return False


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def found(self, name: str) -> list[Path]:
        """Those of phase `name`, by their steps."""
        steps = {path: path.name.rpartition("_")[2] for path in self.folder.glob(f"{name}_*") if path.is_dir()}
        return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))

    def save(self, name: str, task: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Write the state of phase `name` after state["step"] steps, and forget all but the last two.

        Where the schedule goes on from another, from step state["begin"], that one's last is kept, too.
        """
        tensors = {f"task/{key}": value for key, value in task.state_dict().items()}
        others: dict[str, dict[str, Any]] = {}
        for number, values in optimizer.state_dict()["state"].items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{number}/{key}"] = value
                elif value is not None:
                    others.setdefault(str(number), {})[key] = value
        groups = counted(optimizer)
        for number, group in enumerate(groups):
            for key in [key for key, value in group.items() if isinstance(value, Tensor)]:
                tensors[f"group/{number}/{key}"] = group.pop(key)
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        with whole_folder(self.folder / f"{name}_{state['step']:08d}") as beside:
            save_tensors(tensors, beside / "state.safetensors")
            digest = sha256_file(beside / "state.safetensors")
            told = {**state, "phase": name, "optimizer": others, "groups": groups, "sha256": digest}
            write_json(beside / "state.json", {**told, "state_sha256": sha256_json(told)})
        # The last two of this phase; one past this step is another run's, and a phase before this one is over.
        here, before = (self.folder / f"{name}_{step:08d}" for step in (state["step"], state.get("begin", 0)))
        own = self.found(name)
        kept = [before, *own[: own.index(here) + 1][-KEPT:]]
        for old in self.folder.glob("*"):
            if old not in kept and not old.name.startswith("."):
                shutil.rmtree(old, ignore_errors=True)

    def refuse_other(self, name: str, read: dict[str, Any]) -> None:
        """Refuse to begin phase `name` anew if it is under way from other fields or inputs: its checkpoints would go.

        Raises:
            Refused: naming the first that differs.
        """
        found = self.found(name)
        for path in reversed(found):
            try:
                state = read_json(path / "state.json", "read", "step", "of")
            except (Failed, OSError):  # `load` tells of it, if it is asked for
                continue
            step, of = state["step"], state["of"]
            if step < of and (told := first_difference(state["read"], read, "begun")):
                field, how = told
                begin = f"{name}_{state.get('begin', 0):08d}"
                own = " and ".join(str(one) for one in found if one.name > begin)
                raise Refused(
                    f"{field}: the training in {self.folder.parent}, of whose {of} steps {step} are done, {how}; "
                    f"choose another --run, or remove {own}."
                )
            return

    def load(
        self, name: str, read: dict[str, Any], say: Callable[[str], None] = print, earlier: Earlier | None = None
    ) -> Checkpoint | None:
        """The newest whole checkpoint of phase `name` that read the same; else the schedule's before.

        Raises:
            Refused: there is one of a training that read something else, and is not at its end.
            Failed: there is a schedule before, and its last checkpoint is gone.
        """
        self.refuse_other(name, read)
        ours = {sha256_json(read), earlier.fingerprint if earlier else None}
        for path in reversed(self.found(name)):
            try:
                state = read_json(path / "state.json")
                whole = state.pop("state_sha256") == sha256_json(state)
                whole = whole and state["sha256"] == sha256_file(path / "state.safetensors")
            except (Failed, OSError, ValueError, KeyError, TypeError):
                whole = False
            if not whole:
                say(f"{path} is damaged and left aside; going on from the one before it.")
                continue
            if state["phase"] == name and state["fingerprint"] in ours:
                if earlier and state["step"] < earlier.step:
                    break
                return Checkpoint(load_file(path / "state.safetensors"), state)
        if earlier:
            raise Failed(f"{self.folder} has no whole checkpoint to go on from; choose another --run.")
        return None
