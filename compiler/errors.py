"""The one error a user is meant to read."""


class TpvcError(Exception):
    """Bad input: one sentence saying what was found, what was expected and what to do; exit code 2."""
