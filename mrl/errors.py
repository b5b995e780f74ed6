"""The one exception for mistakes that a user can mend, and names that standard output can always show."""

import io
import sys


class UserError(ValueError):
    """A setting, file or image that cannot be used; the message is one sentence that says what to change.

    The scripts print it without a traceback and exit with status 2.
    """


def print_any_name() -> None:
    """Let standard output show file names that are not UTF-8, as standard error does: "\\udce9" for byte e9."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
