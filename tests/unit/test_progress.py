"""What the main process says."""

import contextlib
import io
import logging

from dist_adv.progress import start_logging


def test_messages_go_to_what_stderr_is_at_the_time() -> None:
    """Commands run in one process, as in these tests or a notebook, each have their own."""
    for word in ("first", "second"):
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            start_logging(True)
            logging.getLogger("dist_adv").info(word)
        assert stderr.getvalue().endswith(f" {word}\n")
        stderr.close()
