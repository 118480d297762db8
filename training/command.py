"""What every command shares: a parser, and one sentence with an exit status for what stops it."""

import errno
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from .files import Failed, Refused


class Parser(ArgumentParser):
    """A parser that says what is wrong in one sentence."""

    def read(self, arguments: Sequence[str]) -> Namespace:
        """Parse a command line.

        Raises:
            Refused: it is wrong.
        """
        try:
            return self.parse_args(list(arguments))
        except ArgumentError as error:
            raise Refused(str(error)) from error

    def error(self, message: str, ex: Exception | None = None) -> None:
        text = re.sub(r"\s+", " ", str(message)).strip()
        text = re.sub(r'^Parser key "([^"]+)": ?', r"\1: ", text)
        raise Refused(f"{text} (see --help)") from ex


def model_parser(name: str, description: str, options: str) -> Parser:
    """A parser of ``python -m training.NAME MODEL --data.path DATA``, `options` being what else it takes."""
    usage = " ".join(filter(None, ("%(prog)s MODEL --data.path DATA", options, "[--FIELD VALUE ...]")))
    made = Parser(prog=f"python -m training.{name}", description=description, usage=usage, allow_abbrev=False)
    made.add_argument("model", help="Folder of a backbone, or any name that timm loads with weights.")
    return made


def as_timm_names(model: str) -> str:
    """A MODEL as timm.create_model takes it: folders by their prefix."""
    return f"local-dir:{model}" if Path(model).is_dir() else model


def short_name(model: str) -> str:
    """What to call a MODEL: its last part, with the one before it where that alone tells nothing."""
    parts = Path(model.split(":", 1)[-1]).parts or Path.cwd().parts
    known = re.fullmatch(r"hub|proxy|best|last|round_\d+", parts[-1])
    return "_".join(parts[-2:] if known else parts[-1:])


def guarded(command: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    """Run a command; what stops it is one sentence on stderr and an exit status.

    Returns:
        0; 1 for a failure; 2 for a wrong request; 128 + signal after a signal.
    """
    from .launch import Interrupted, end_processes

    try:
        command(arguments)
        end_processes()
    except Refused as error:
        return _say(str(error), 2)
    except Failed as error:
        return _say(str(error), 1)
    except Interrupted as error:
        return _say(str(error), 128 + error.number)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        return _say(f"{error.filename or 'a file'} cannot be written: {error.strerror}; what was finished is kept.", 1)
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        return _say("Out of memory; a larger accumulate or a smaller batch_size needs less. Finished work is kept.", 1)
    return 0


def _say(text: str, status: int) -> int:
    print(f"error: {text}" if status < 128 else text, file=sys.stderr)
    return status
