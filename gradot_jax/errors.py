"""Errors that a user can mend."""


class InputError(ValueError):
    """Something given from outside is refused: a file, a configuration, an option.

    The message is one paragraph that names where (file, layer, site), what was found and what
    was expected. Nothing has been written when it is raised.
    """


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the host, or by XLA's report a device, has no memory left."""
    exhausted = isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    return exhausted or isinstance(error, MemoryError)
