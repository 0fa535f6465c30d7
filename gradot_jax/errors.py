"""Errors that a user can mend."""


class InputError(ValueError):
    """Something given from outside is refused: a file, a configuration, an option.

    The message is one paragraph that names where (file, layer, site), what was found and what
    was expected. Nothing has been written when it is raised.
    """
