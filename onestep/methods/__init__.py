"""The options of every method, a dataclass each, without importing torch; what methods do is `onestep.objectives`."""

from difflib import get_close_matches
from importlib import import_module

from ..config import MethodConfig

METHODS: dict[str, str] = {
    "dmd2": "dmd2:DMD2",
    "dmd": "dmd:DMD",
    "diff-instruct": "diff_instruct:DiffInstruct",
    "f-distill": "f_distill:FDistill",
    "sid": "sid:SiD",
    "sim": "sim:SIM",
    "disback": "disback:DisBack",
    "swiftbrush": "swiftbrush:SwiftBrush",
    "snoopi": "snoopi:Snoopi",
    "ladd": "ladd:LADD",
    "sfd": "sfd:SFD",
    "regression": "regression:Regression",
    "score-matching": "score_matching:ScoreMatching",
    "kd": "kd:KD",
    "hipa": "hipa:HiPA",
    "instaflow": "instaflow:InstaFlow",
    "boot": "boot:BOOT",
    "vsd": "vsd:VSD",
    "sds": "sds:SDS",
    "asd": "sds:ASD",
    "agd": "agd:AGD",
    "cd": "cd:CD",
    "lcm": "lcm:LCM",
    "scott": "scott:SCott",
    "hyper-sd": "hyper_sd:HyperSD",
    "hyper-sd-score": "hyper_sd_score:HyperSDScore",
    "scm": "scm:SCM",
    "meanflow": "meanflow:MeanFlow",
}
"""By the name that --method takes: `module:Class` in `onestep.objectives`, whose options are ClassConfig in the module of
the same name here."""


def located(name: str) -> tuple[str, str]:
    """(module, class) of a method. Raises ValueError with the nearest name for an unknown one."""
    if name not in METHODS:
        near = get_close_matches(name, METHODS, 1)
        hint = f"; did you mean --method {near[0]}?" if near else ""
        raise ValueError(f"no method {name!r}; allowed are {', '.join(METHODS)}{hint}")
    module, _, attribute = METHODS[name].partition(":")
    return module, attribute


def config_class(name: str) -> type[MethodConfig]:
    """The dataclass of a method's own options: `Objective.Config` of its class. Raises ValueError as `located` does."""
    module, attribute = located(name)
    return getattr(import_module(f".{module}", __name__), f"{attribute}Config")
