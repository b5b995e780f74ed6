"""The one exception for mistakes that a user can fix."""


class UserError(ValueError):
    """A setting, file or image that cannot be used; the message is one sentence that says what to change.

    The scripts print it without a traceback and exit with status 2.
    """
