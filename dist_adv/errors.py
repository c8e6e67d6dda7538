"""The two ways in which a command fails; `cli.main` turns them into one line and an exit status."""


class UserError(Exception):
    """Something that the user can mend: what is wrong, which key or file, what to do. Exit 2."""


class RunFailure(Exception):
    """A run that could not go on for a reason outside the user's input. Exit 1."""
