"""Recipes' files: YAML, of what YAML can say only what a recipe needs, and what is wrong with one in one sentence."""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .files import Refused, read_text
from .recipe import Recipe


class _Loader(yaml.SafeLoader):
    """Plain YAML, of text: no aliases, with which a file can hold itself, or more than memory; no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not read", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_scalar(self, node: Any) -> Any:
        made = super().construct_scalar(node)
        if re.search("[\0\ud800-\udfff]", made):
            raise yaml.constructor.ConstructorError(None, None, "a character that no text has", node.start_mark)
        return made

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        made = super().construct_mapping(node, deep)
        if len(made) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key is given twice", node.start_mark)
        if wrong := [key for key in made if key == "" or " " in str(key)]:
            told = f"a key has a space: {wrong[0]!r}" if wrong[0] else "a key is empty"
            raise yaml.constructor.ConstructorError(None, None, told, node.start_mark)
        return made


def check_mappings(arguments: Sequence[str]) -> None:
    """Refuse mappings that `_Loader` would not read, which jsonargparse does without naming the option.

    Raises:
        Refused: naming it.
    """
    for argument, following in itertools.pairwise([*arguments, ""]):
        option, mark, value = argument.partition("=")
        value = value if mark else following
        if option.startswith("--") and value.lstrip().startswith("{"):
            try:
                yaml.load(value, _Loader)
            except yaml.constructor.ConstructorError as error:
                raise Refused(f"{option[2:]}: {value} cannot be read: {error.problem}.") from error
            except (yaml.YAMLError, RecursionError):  # which the parser says itself
                continue


def load(path: Path, kind: type = Recipe, example: str = "proxy: {epochs: 5}") -> dict[str, Any]:
    """The fields of a recipe, as its file has them.

    Args:
        path: of the file.
        kind: the dataclass whose fields it is to have.
        example: of a field.

    Raises:
        Refused: it is no text, no YAML, or has no fields.
    """
    try:
        fields = yaml.load(read_text(path), _Loader)
    except RecursionError as error:
        raise Refused(f"--config: {path} is nested too deeply.") from error
    except yaml.YAMLError as error:
        text = " ".join(str(error).replace('"<unicode string>", ', "").split())
        raise Refused(f"--config: {path} cannot be read as YAML: {text}") from error
    if not isinstance(fields, dict):
        raise Refused(f"--config: {path} has no fields, such as `{example}`.")
    if unknown := [name for name in fields if name not in {field.name for field in dataclasses.fields(kind)}]:
        raise Refused(f"--config: {path} is no recipe of this command: it has no field {unknown[0]!r}.")
    _check_groups(kind, fields, f"--config: {path}: ")
    return fields


def _check_groups(kind: type, fields: dict[str, Any], prefix: str) -> None:
    """Refuse a value where a dataclass of settings has fields of its own, naming it after `prefix`."""
    for field in dataclasses.fields(kind):
        own = dataclasses.is_dataclass(field.type)
        if field.name not in fields or not (own or field.name == "options"):
            continue
        if not isinstance(fields[field.name], dict):
            raise Refused(f"{prefix}{field.name} has fields of its own, and {fields[field.name]!r} is none of them.")
        if own:
            _check_groups(field.type, fields[field.name], f"{prefix}{field.name}.")
