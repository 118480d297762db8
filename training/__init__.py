"""How SSL++ backbones are made. Run from a clone (``python -m training``), never installed."""

import sys
from types import TracebackType


def _told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C is one sentence from the first moment on, also while a command's modules are imported."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped by SIGINT; nothing was begun", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # as long as python looks for the command's module
    sys.excepthook = _told
