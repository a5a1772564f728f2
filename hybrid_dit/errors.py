"""The one exception type whose message is meant for the person at the keyboard."""


class UserError(Exception):
    """Bad input: the message says what was wrong, where, and what to do. Entry points print it and exit with 2."""
