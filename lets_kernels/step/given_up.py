"""Steps that somebody else has ended."""


def given_up() -> RuntimeError:
    """For a step that cannot go on."""
    return RuntimeError(
        "restore() was called in the middle of this step, by a signal handler perhaps: the step is given up, and the "
        "weights are those from before it"
    )
