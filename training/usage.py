"""What --help says: the options that people set, on one screen; and --help_all, every one in the order of a run."""

import shutil
import textwrap
from argparse import SUPPRESS
from collections.abc import Collection, Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentParser

LAST = "What is said on the way"  # the group of options that comes last, as it does in a run
HIDDEN = ("print_config", "print_shtab", "help_all")  # told of in the last line, if at all
INDENT = 34


def kind(hint: Any) -> str:
    """A type as people read it, e.g. "N | auto"."""
    parts = [part for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) is Literal:
        return "|".join(map(str, parts))
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(map(kind, parts))
    if get_origin(hint) is list:
        return f"[{kind(parts[0])}, ...]"
    if get_origin(hint) is tuple:
        return f"[{', '.join(map(kind, parts))}]"
    if get_origin(hint) is dict or hint is dict:
        return "{NAME: VALUE, ...}"
    if hint is bool:
        return "true|false"
    for base, word in ((int, "N"), (float, "X")):
        if isinstance(hint, type) and issubclass(hint, base):
            return word
    return "TEXT"


def whole(parser: ArgumentParser) -> str:
    """Every option by its group."""
    groups = sorted(parser._action_groups, key=lambda group: group.title == LAST)
    blocks = ["\n".join(_lines(parser, group._group_actions)) for group in groups]
    titles = [{"options": "The run", "positional arguments": "What it is given"}.get(g.title, g.title) for g in groups]
    told = [f"{title}\n{block}" for title, block in zip(titles, blocks, strict=True) if block]
    return "\n\n".join([_head(parser), *told]) + "\n"


def short(parser: ArgumentParser, usual: Collection[str]) -> str:
    """The usual options alone, by name."""
    known = {action.dest: action for action in parser._actions}
    more = sum(1 for action in parser._actions if _shown(action)) - len(usual)
    last = f"In brackets, what is taken without it. --help_all tells of {more} more; a recipe is a YAML file of them."
    return "\n\n".join([_head(parser), "\n".join(_lines(parser, [known[name] for name in usual])), last]) + "\n"


def _head(parser: ArgumentParser) -> str:
    usage = (parser.usage or "%(prog)s [--FIELD VALUE ...]") % {"prog": parser.prog}
    return f"usage: {usage}\n\n" + textwrap.fill(parser.description or "", _width())


def _width() -> int:
    return min(110, max(60, shutil.get_terminal_size().columns))


def _shown(action: Any) -> bool:
    """Whether it is an option of its own, and no file for a whole group."""
    told = action.dest not in HIDDEN and action.help != SUPPRESS
    return told and type(action).__name__ not in ("_ActionConfigLoad", "_HelpAction")


def _lines(parser: ArgumentParser, actions: Collection[Any]) -> Iterator[str]:
    for action in filter(_shown, actions):
        hint, default = getattr(action, "_typehint", None), parser.get_default(action.dest)
        name = action.option_strings[0] if action.option_strings else action.dest.upper()
        value = kind(hint) if hint else action.metavar or "FILE"
        takes = "" if action.nargs == 0 or not action.option_strings else f" {value}"
        without = "" if default in (None, {}, [], False) or not hint else f" [{_plain(default)}]"
        left, text = f"  {name}{takes}", " ".join((action.help or "").split()) + without
        if len(left) > INDENT - 2:
            yield left
            left = ""
        yield textwrap.fill(
            text, _width(), initial_indent=left.ljust(INDENT), subsequent_indent=" " * INDENT, break_on_hyphens=False
        )


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "true"
    return f"{value:g}" if isinstance(value, float) else str(value).strip("[]()").replace("'", "")
