"""The configuration of a run: typed sections, YAML files that extend others, overrides.

`load_config` is the only way in. What a user can get wrong raises UserError with one line that
names the file or key and the remedy.
"""

from dist_adv.config.compare import differences, flatten, longer, training_differences
from dist_adv.config.loading import load, load_config, parse, parse_config
from dist_adv.config.schema import (
    Config,
    EvalOptions,
    Judged,
    OptimOptions,
    Reference,
    ThreatOptions,
    TrainOptions,
)
from dist_adv.config.yaml_text import parse_yaml

__all__ = [
    "Config",
    "EvalOptions",
    "Judged",
    "OptimOptions",
    "Reference",
    "ThreatOptions",
    "TrainOptions",
    "differences",
    "flatten",
    "load",
    "load_config",
    "longer",
    "parse",
    "parse_config",
    "parse_yaml",
    "training_differences",
]
