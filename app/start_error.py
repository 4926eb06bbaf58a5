"""Why a server does not start."""


class StartError(RuntimeError):
    """Something it needs is missing or wrong; the message says what, for whoever started it."""
