"""Push runs to Weights & Biases from their folders, each as one whole run.

The pieces that the starts of a resumed run left in `wandb/` are not merged. A start that was
killed has lost the rows that it had not written yet; `wandb sync` lets a later piece take the
place of an earlier one; and their format is W&B's own. The run folder has every line and every
figure, so the run is written from it, under its id, as one that goes on after the last row that
W&B has: a second push doubles nothing, and adds what was measured since. What W&B lacks before
its last row it does not take any more.

Of the pieces only the images of each epoch are used. System metrics stay in them.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from dist_adv import packages
from dist_adv.config import load_config
from dist_adv.errors import RunFailure, UserError
from dist_adv.runs.checkpoint import newest_state
from dist_adv.runs.folder import RunFolder
from dist_adv.runs.run import Record, Run, read_runs
from dist_adv.tracking import wandb_env
from dist_adv.tracking.wandb_run import WandbRun, identity, logged_in, place, reason, saved_identity

_STATUS = {"done": 0, "failed": 1}


def sync_runs(run_dirs: Sequence[Path], offline: Path | None) -> Iterator[tuple[str, str]]:
    """Yield (name of the run, where it is now) as each is pushed, or written under `offline`.

    Raises UserError where nobody is logged in, before anything is done; RunFailure where W&B
    cannot be reached.
    """
    packages.need("wandb", "sync", "wandb")
    wandb_env.check()
    import wandb

    runs = read_runs(run_dirs)
    known = [saved_identity(RunFolder(run.folder)) for run in runs]
    wandb_env.refuse_one_id_for_many(known.count({}))
    if offline is None and not logged_in():
        raise UserError(
            "sync: nobody is logged in to W&B; run `wandb login`, set WANDB_API_KEY, or see what "
            "would be pushed with --offline DIR"
        )
    for run in runs:
        try:
            yield run.label, _push(run, offline)
        except (wandb.Error, ValueError, OSError) as error:
            raise RunFailure(
                f"{run.folder}: not pushed ({reason(error)}); the same command goes on"
            ) from error


def _push(run: Run, offline: Path | None) -> str:
    folder = run.folder
    if offline:
        folder = offline / run.label
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--offline: {folder} cannot be made ({error.strerror}); name another folder"
            ) from None
    source = RunFolder(run.folder)
    config = load_config(source.config)
    saved_id = newest_state(source.checkpoints).get("wandb_id")
    about = identity(source, config, saved_id, keep=True)
    view = WandbRun(
        source,
        config,
        about,
        "offline" if offline else "online",
        folder=folder,
        x_disable_machine_info=True,  # this may not be the machine that trained
        x_save_requirements=False,
    )
    for record in run.metrics:
        view.metrics(record, _image(run, record))
    view.results(run)
    if run.finished:
        view.artifacts(run)
    where = view.run.dir if offline else view.run.url
    view.finish(_STATUS.get(source.state or "", 143))
    return str(where)


def _image(run: Run, record: Record) -> str | None:
    """Return the picture that a start has left for W&B with this line."""
    name = f"examples_{place(record['step'], record['kind'])}_*.png"
    found = sorted(run.folder.glob(f"wandb/*run-*/files/media/images/epoch/{name}"))
    return str(found[0]) if found else None
