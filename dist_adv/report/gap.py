"""How far AutoAttack's figure lies below that of PGD-50 on the same images."""

import re
from collections import Counter
from collections.abc import Sequence

from dist_adv.runs.run import Run

AUTOATTACK = "autoattack"
_PGD_50 = re.compile(r"pgd-50(?:-(\d+))?")  # steps, restarts


def rival_of_autoattack(runs: Sequence[Run]) -> str | None:
    """Return the PGD-50 that most runs have a gap to; of several the one of the most restarts.

    A column of gaps means something only where all are to the same attack.
    """
    counts = Counter(
        attack
        for run in runs
        for attack in run.evaluations
        if _PGD_50.fullmatch(attack) and gap(run, attack) is not None
    )
    return max(counts, key=lambda attack: (counts[attack], _restarts(attack)), default=None)


def _restarts(attack: str) -> int:
    match = _PGD_50.fullmatch(attack)
    return int(match[1] or 1) if match else 0


def gap(run: Run, attack: str) -> float | None:
    """Return by how many points AutoAttack leaves less than `attack`; None where that is unknown.

    As many images of one split are the same images: `eval.limit` takes the first of a fixed order.
    """
    judged, other = run.evaluations.get(AUTOATTACK), run.evaluations.get(attack)
    if not judged or not other:
        return None
    if (judged.n, judged.record.get("split")) != (other.n, other.record.get("split")):
        return None
    return 100 * (other.accuracy - judged.accuracy)
