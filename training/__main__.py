"""python -m training: a recipe in, a run folder out. Without any argument, the quickstart: a comparison on digits."""

import errno
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .files import Failed, Refused

QUICKSTART = Path(__file__).parent.parent / "hub_configs" / "quickstart" / "recipe.yaml"


def main(arguments: Sequence[str]) -> None:
    if not arguments:
        from . import compare

        arms = ["random", "proxy", "scratch", "finetune_all", "sslpp"]
        compare.main(["--config", str(QUICKSTART)], arms=arms, seeds=[3, 4, 5], grid=[1.0])
        return
    from .launch import StopSignals
    from .recipe import parse
    from .run import run

    with StopSignals() as stop:
        run(parse(arguments), stop)


def guarded(command: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    """Run a command; what stops it is one sentence on stderr and an exit status.

    Returns:
        0; 1 for a failure; 2 for a wrong request; 128 + signal after a signal.
    """
    from .launch import Interrupted

    try:
        command(arguments)
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


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
