"""What every command shares: what stops it is one sentence and an exit status."""

import errno
import sys
from collections.abc import Callable, Sequence

from .files import Failed, Refused


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
