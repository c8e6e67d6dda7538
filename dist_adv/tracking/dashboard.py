"""A workspace and a report for Weights & Biases, of what `wandb_run.py` logs.

Built by wandb-workspaces. The specification is a file in any case; who is logged in has both on
W&B as well.
"""

import json
from pathlib import Path
from typing import Any

from dist_adv import files
from dist_adv.errors import RunFailure, UserError
from dist_adv.tracking import wandb_env
from dist_adv.tracking.wandb_run import logged_in

_TITLE = "Adversarial training"


def make_dashboard(out: Path, project: str, entity: str | None) -> list[str]:
    """Write workspace and report to `out`, replacing earlier ones; return where they are on W&B.

    Nowhere, where nobody is logged in or WANDB_MODE is offline. Raises UserError where `out` is
    something else or wandb-workspaces is not installed, RunFailure where W&B refuses.
    """
    file = files.output_file(out, "--out", _is_own)
    try:
        import wandb
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise UserError(
            "dashboard: wandb-workspaces is not installed; pip install 'dist-adv[dashboard]'"
        ) from None
    online = wandb_env.mode() in ("auto", "online") and logged_in()
    try:
        with wandb_env.hidden():
            entity = entity or (wandb.Api().default_entity if online else "")
        sections = [ws.Section(name, panels=panels) for name, panels in _sections(wr).items()]
        workspace = ws.Workspace(entity=entity, project=project, name=_TITLE, sections=sections)
        report = wr.Report(entity=entity, project=project, title=_TITLE, blocks=_blocks(wr))
        views = {"workspace": workspace, "report": report}
        specification = {name: _as_json(view) for name, view in views.items()}
        files.replace(file, json.dumps(specification, indent=1).encode())
        return [view.save().url for view in views.values()] if online else []
    except (wandb.Error, ValueError, TypeError) as error:
        raise RunFailure(f"dashboard: W&B does not take it ({error}); {out} may have it") from error


def _is_own(content: bytes) -> bool:
    """Tell whether it is the specification of a dashboard."""
    try:
        return json.loads(content).keys() == {"workspace", "report"}
    except (ValueError, AttributeError, RecursionError):
        return False


def _sections(wr: Any) -> dict[str, list[Any]]:
    """Panels by heading, for any number of runs."""

    def curve(title: str, x: str, *y: str) -> Any:
        return wr.LinePlot(title=title, x=x, y=list(y))

    natural, robust = "epoch/test_accuracy", "epoch/pgd_accuracy"
    slowest, fastest = "train/rank_images_per_s_min", "train/rank_images_per_s_max"
    trade_off = wr.ScatterPlot(
        title="Final weights: natural and robust accuracy",
        x=wr.SummaryMetric("final/natural"),
        y=wr.SummaryMetric("final/robust"),
    )
    return {
        "Accuracy by epoch": [
            curve("Natural accuracy", "epoch", natural),
            curve("Robust accuracy", "epoch", robust),
        ],
        "Accuracy by time": [
            curve("Natural accuracy by seconds of training", "epoch/seconds", natural),
            curve("Robust accuracy by seconds of training", "epoch/seconds", robust),
        ],
        "Trade-off": [trade_off],
        "Catastrophic overfitting": [
            curve(
                "FGSM and PGD: one stays while the other falls",
                "epoch",
                "epoch/fgsm_accuracy",
                robust,
            )
        ],
        "Throughput": [
            curve("Images a second, all ranks", "step", "train/images_per_s"),
            curve("Images a second, slowest and fastest rank", "step", slowest, fastest),
        ],
        "Adversarial images": [
            wr.MediaBrowser(media_keys=["epoch/examples", "final/examples"], gallery_axis="step")
        ],
    }


def _blocks(wr: Any) -> list[Any]:
    """Return the report: all runs, then Free against Fast."""
    sections = _sections(wr)
    blocks = []
    for heading, panels in sections.items():
        blocks += [wr.H2(heading), wr.PanelGrid(runsets=[wr.Runset()], panels=panels)]
    two = wr.Runset(
        name="Free and Fast",
        filters="Config('method.value.name') in ['free', 'fast']",
        groupby=["config.method.name"],
    )
    panels = [panel for name in ("Accuracy by time", "Trade-off") for panel in _sections(wr)[name]]
    return [*blocks, wr.H2("Free against Fast"), wr.PanelGrid(runsets=[two], panels=panels)]


def _as_json(view: Any) -> Any:
    return json.loads(view._to_model().model_dump_json(by_alias=True, exclude_none=True))
