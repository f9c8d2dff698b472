class InputError(ValueError):
    """The user's input is at fault: scripts print it as one line and exit with status 2."""
