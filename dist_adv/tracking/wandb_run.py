"""A run on Weights & Biases: what is logged there, and under which names.

The run folder is the record and this is a view of it, made while training (`tracker.py`) or from
the folder alone (`sync.py`).
"""

import json
import logging
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from dist_adv import files
from dist_adv.config import Config
from dist_adv.errors import STOPPED, UserError
from dist_adv.runs import environment
from dist_adv.runs.folder import RunFolder
from dist_adv.text import shown
from dist_adv.tracking import wandb_env

if TYPE_CHECKING:  # the report imports matplotlib, for which no start of a run should wait
    from dist_adv.evaluation import results
    from dist_adv.runs import run as runs

    Examples = results.Examples | runs.Examples

log = logging.getLogger("dist_adv")

_KINDS = ("train", "epoch", "final")  # of lines, in their order at one optimiser step


def place(step: int, kind: str) -> int:
    """W&B's own step of a line: it drops rows at or before the last that it has.

    So what a resumed run does again is there once.
    """
    return len(_KINDS) * step + _KINDS.index(kind)


def named(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of metrics.jsonl as dashboards know them: `train/loss`, ..."""
    kind = record["kind"]
    return {f"{kind}/{key}": v for key, v in record.items() if isinstance(v, int | float)}


def final(run: "runs.Run") -> dict[str, float]:
    """Return the accuracy of the final weights under each attack; `robust` is the lowest."""
    accuracies = {attack: each.accuracy for attack, each in run.evaluations.items()}
    attacked = [accuracies[attack] for attack in accuracies if attack != "natural"]
    found = accuracies | ({"robust": min(attacked)} if attacked else {})
    return {f"final/{name}": accuracy for name, accuracy in found.items()}


def picture(examples: "Examples") -> np.ndarray:
    """(height, width, 1 or 3) bytes: a row of clean images and, below, the attacked ones."""
    rows = [
        np.concatenate(list(np.asarray(images)), axis=2)
        for images in (examples.clean, examples.adversarial)
    ]
    return (np.concatenate(rows, axis=1) * 255).round().astype(np.uint8).transpose(1, 2, 0)


def caption(examples: "Examples") -> str:
    """Return what each image is, what it is taken for, and what for after the attack."""
    answers = (examples.label, examples.clean_prediction, examples.adversarial_prediction)
    names = ([shown(examples.classes[int(i)]) for i in numbers] for numbers in answers)
    each = ", ".join(
        f"{label}: {clean} > {attacked}" for label, clean, attacked in zip(*names, strict=True)
    )
    return f"clean and {examples.attack} (label: answer > answer when attacked): {each}"


def start(
    run: RunFolder, config: Config, saved_id: str | None = None, started_from: str | None = None
) -> "WandbRun | None":
    """Return the W&B run, offline where nobody is logged in or the server is out of reach.

    None where there is none to be: `disabled`, or W&B refuses even that, which is said aloud.
    """
    mode = wandb_env.mode(config.track.wandb.mode)
    if mode == "disabled":
        return None
    try:
        import wandb

        about = identity(run, config, saved_id, started_from)
        try:
            if mode == "auto":
                mode = "online" if logged_in() else "offline"
            return WandbRun(run, config, about, mode)
        except (wandb.Error, OSError) as error:
            said = reason(error)
            log.warning("W&B is out of reach (%s): recording offline in %s/wandb", said, run)
            wandb.teardown()  # or the id counts as in use
            return WandbRun(run, config, about, "offline")
    # Whatever it comes up with: it is not installed or does not fit its own dependencies, a name
    # that it does not like, a disk.
    except Exception as error:
        log.warning("no W&B (%s); metrics.jsonl is the record", reason(error))
        return None


def logged_in() -> bool:
    """Tell whether W&B knows a key. Nothing is asked for, and no server either."""
    import wandb

    with wandb_env.hidden():
        return bool(wandb.login(prompt=False, verify=False))


def reason(error: Exception) -> str:
    """Return on one line what W&B says; of a variable that it refuses, its name."""
    if isinstance(error, ValidationError):
        each = error.errors()[0]
        return f"WANDB_{'.'.join(map(str, each['loc'])).upper()}: {each['msg']}"
    return " ".join(str(error).split())


def identity(
    run: RunFolder,
    config: Config,
    saved_id: str | None = None,
    started_from: str | None = None,
    keep: bool = False,
) -> dict[str, Any]:
    """Return what W&B knows the run by, kept in wandb/run.json: id, project, name, tags, ...

    The first start in a folder settles the id: WANDB_RUN_ID, or else `saved_id`, of the folder's
    own checkpoint, or a new one; so does the first start in a copy of a folder. Of the rest W&B's
    variables go before the configuration; with `keep` what an earlier start wrote does too.

    started_from: the id of another run, from a checkpoint of which this one starts.
    """
    known = saved_identity(run)
    if not keep and _is_copy(run, known):
        log.info("%s: is a copy of %s, so it is another run on W&B", run, known["folder"])
        saved_id, started_from, known = None, known["id"], {}
    options = config.track.wandb
    about = {
        **options.model_dump(exclude={"mode"}),
        "name": options.name or run.path.resolve().name,
        "tags": options.tags or [config.method.name, config.data.name, config.model.name],
        "folder": str(run.path.resolve()),
        **(known if keep else {}),
    }
    first = wandb_env.run_id() or saved_id or secrets.token_hex(8)
    about |= {
        **wandb_env.keys(),
        "id": known.get("id", first),
        "started_from": started_from or known.get("started_from"),
    }
    if about != known:
        run.identity.parent.mkdir(exist_ok=True)
        files.replace(run.identity, json.dumps(about, indent=1).encode())
    return about


def saved_identity(run: RunFolder) -> dict[str, Any]:
    """Return what an earlier start wrote. Raises UserError for a file that is damaged."""
    path = run.identity
    try:
        known = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); remove it for a new id") from None
    if not isinstance(known, dict):
        raise UserError(f"{path}: not a JSON object; remove it for a new id")
    return known


def _is_copy(run: RunFolder, known: Mapping[str, Any]) -> bool:
    """Tell whether the folder that this was written for is still there, and has the same id.

    A folder that was moved, or is mounted elsewhere, is no copy.
    """
    original = RunFolder(Path(known.get("folder", run)))
    with suppress(OSError, UserError):
        elsewhere = not original.path.samefile(run)
        return elsewhere and saved_identity(original).get("id") == known["id"]
    return False


class WandbRun:
    """A run of W&B's own, open until `finish`.

    about: of `identity`; what W&B has of this id is gone on with. folder: where its files go, if
    not to the run folder.
    """

    def __init__(
        self,
        run: RunFolder,
        config: Config,
        about: Mapping[str, Any],
        mode: Any,
        folder: Path | None = None,
        **settings: Any,
    ) -> None:
        import wandb

        self.id: str = about["id"]
        checkout = environment.checkout()
        shown = {**config.model_dump(), "env": json.loads(run.environment.read_text())}
        if about["started_from"]:
            shown["started_from"] = about["started_from"]
        with wandb_env.hidden():
            self.run = wandb.init(
                **{key: about[key] for key in about if key not in ("started_from", "folder")},
                dir=folder or os.environ.get("WANDB_DIR") or run.path,
                config=shown,
                allow_val_change=True,  # `env` is of the last start
                resume="allow",
                mode=mode,
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    git_root=checkout and str(checkout),  # of this code, wherever it is started
                    disable_git=checkout is None,
                    init_timeout=wandb_env.init_timeout(),
                    **settings,
                ),
            )
        # Points are placed by these and not by W&B's own counter (see `place`).
        self.run.define_metric("train/*", step_metric="step")
        self.run.define_metric("epoch/*", step_metric="epoch")

    def metrics(self, record: Mapping[str, Any], image: Any = None, caption: str = "") -> None:
        """Log a line of metrics.jsonl; image: a picture of `picture`, or the file of one."""
        import wandb

        row = named(record) | {"step": record["step"], "epoch": record["epoch"]}
        if image is not None:
            row["epoch/examples"] = wandb.Image(image, caption=caption)
        self._log(row, record["step"], record["kind"])

    def results(self, run: "runs.Run") -> None:
        """Log the accuracies of the final weights, and images after the last attack."""
        import wandb

        self.run.summary.update(final(run))
        if run.examples:
            image = wandb.Image(picture(run.examples), caption=caption(run.examples))
            self._log({"final/examples": image}, run.steps, "final")

    def artifacts(self, run: "runs.Run") -> None:
        """Log the final weights and the report on them.

        Files are referred to and not copied: an offline run would leave a copy of every model in
        the home directory.
        """
        import wandb

        from dist_adv.report import write_report

        metadata = {"method": run.config["method"]["name"], "threat": run.config["threat"]}
        metadata |= {"epochs": run.epochs_done, "steps": run.steps, "results": final(run)}
        folder = Path(self.run.dir).resolve().with_name("report")
        write_report([run.folder], folder)
        weights = [run.folder / name for name in ("model.safetensors", "config.yaml")]
        pages = [path for path in folder.rglob("*") if path.is_file()]
        for kind, members in (("model", weights), ("report", pages)):
            artifact = wandb.Artifact(f"{kind}-{self.id}", kind, metadata=metadata)
            for path in members:
                name = str(path.relative_to(folder if kind == "report" else run.folder))
                artifact.add_file(str(path), name, policy="immutable", skip_cache=True)
            self.run.log_artifact(artifact)

    def alert(self, title: str, text: str) -> None:
        """Send a message to whoever has asked W&B for them."""
        self.run.alert(title, text, level="ERROR")

    def finish(self, status: int = 0) -> None:
        """Flush everything; status: as of the process."""
        import wandb

        if status in STOPPED:
            self.run.mark_preempting()  # it will go on: no crash
        self.run.finish(exit_code=status)
        wandb.teardown()  # `finish` returns before the last records are in the file

    def _log(self, row: Mapping[str, Any], step: int, kind: str) -> None:
        at = place(step, kind)
        if at >= self.run.starting_step:  # else W&B has it, and would only complain
            self.run.log({}, step=at)  # files of images are named by the step before
            self.run.log(dict(row), step=at, commit=True)
