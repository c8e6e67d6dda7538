"""What an interrupted evaluation has measured so far: the same command goes on from there."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from accelerate import Accelerator
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from dist_adv import files
from dist_adv.distributed.collectives import on_main

log = logging.getLogger("dist_adv")


class Entry(BaseModel):
    """done: images, from the beginning of their order; sums: over them; seconds: spent on them."""

    done: Annotated[int, Field(ge=0)] = 0
    sums: list[float]
    seconds: float = 0.0
    messages: list[str] = []


_FILE = TypeAdapter(dict[str, Entry])


class Unfinished:
    """Sums over the images done, an entry an attack, in `unfinished-<hash>.json` of a run folder.

    about: everything that the figures depend on: weights, data, attack settings. Other weights or
    settings have another file. Every rank makes one; the main process alone reads and writes.
    """

    def __init__(self, run_dir: Path, about: Mapping[str, Any], accelerator: Accelerator) -> None:
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
        self.path, self.main = run_dir / f"unfinished-{name}.json", accelerator.is_main_process
        self.entries: dict[str, Entry] = on_main(accelerator, self._read)

    def find(self, attack: str, size: int) -> Entry | None:
        """Return what is known of `size` sums."""
        found = self.entries.get(attack)
        if found is None or len(found.sums) != size:
            return None
        log.info("%s: going on after %d images", attack, found.done)
        return found

    def keep(self, attack: str, entry: Entry) -> None:
        """Write the sums so far. Raises RunFailure where the disk refuses."""
        self.entries[attack] = entry
        if self.main:
            # Somebody may have started the same evaluation twice.
            files.replace(self.path, _FILE.dump_json(self.entries), f"-{os.getpid()}")

    def finished(self) -> None:
        """Remove the file: the figures are written down elsewhere."""
        if self.main:
            self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Entry]:
        try:
            return _FILE.validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValidationError) as error:
            reason = str(error).splitlines()[0]
            log.warning("%s: %s; measuring from the beginning", self.path, reason)
            return {}
