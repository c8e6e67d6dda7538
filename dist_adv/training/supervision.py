"""One start of a command on a run: the same on every rank, recorded however it ends."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from accelerate import Accelerator

from dist_adv.config import Config
from dist_adv.distributed.session import Session
from dist_adv.errors import Preempted
from dist_adv.runs.folder import RunFolder
from dist_adv.tracking.tracker import Tracker

log = logging.getLogger("dist_adv")


@contextmanager
def supervised(
    run: RunFolder,
    config: Config,
    accelerator: Accelerator,
    tracker: Tracker | None,
    where: Callable[[], dict[str, float]],
) -> Iterator[Session]:
    """Yield a session; status.json and the dashboards are told how it ended.

    where: gives the step and the epoch at which the run is.
    """
    main = accelerator.is_main_process
    finish = tracker.finish if tracker else lambda status, failure="": None
    session = Session(accelerator, run.path, config.train)
    try:
        yield session
        session.leave()
        if main:
            run.mark("done")
        finish(0)
    except Preempted as stop:
        log.warning("stopped (%s) at optimiser step %d", stop.reason, where()["step"])
        if main:
            session.stopping.heeded()
            run.mark("preempted", reason=stop.reason, **where())
        finish(stop.status)
        session.leave()  # the first to go gets the others killed
        raise
    except Exception as error:
        finish(1, f"{run}: {error}")
        raise
    finally:
        session.close()
