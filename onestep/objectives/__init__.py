"""Distillation objectives, one paper a file, by the name that `--method` takes."""

from difflib import get_close_matches
from importlib import import_module

from .base import Batch, Objective

OBJECTIVES: dict[str, str] = {
    "dmd2": "onestep.objectives.dmd2:DMD2",
    "dmd": "onestep.objectives.dmd:DMD",
    "diff-instruct": "onestep.objectives.diff_instruct:DiffInstruct",
    "f-distill": "onestep.objectives.f_distill:FDistill",
    "sid": "onestep.objectives.sid:SiD",
    "sim": "onestep.objectives.sim:SIM",
    "disback": "onestep.objectives.disback:DisBack",
    "swiftbrush": "onestep.objectives.swiftbrush:SwiftBrush",
    "snoopi": "onestep.objectives.snoopi:Snoopi",
    "ladd": "onestep.objectives.ladd:LADD",
    "sfd": "onestep.objectives.sfd:SFD",
    "regression": "onestep.objectives.regression:Regression",
    "score-matching": "onestep.objectives.score_matching:ScoreMatching",
    "kd": "onestep.objectives.kd:KD",
    "hipa": "onestep.objectives.hipa:HiPA",
    "instaflow": "onestep.objectives.instaflow:InstaFlow",
    "boot": "onestep.objectives.boot:BOOT",
    "vsd": "onestep.objectives.vsd:VSD",
    "sds": "onestep.objectives.sds:SDS",
    "asd": "onestep.objectives.sds:ASD",
    "agd": "onestep.objectives.agd:AGD",
    "cd": "onestep.objectives.cd:CD",
    "lcm": "onestep.objectives.lcm:LCM",
    "scott": "onestep.objectives.scott:SCott",
    "hyper-sd": "onestep.objectives.hyper_sd:HyperSD",
    "hyper-sd-score": "onestep.objectives.hyper_sd_score:HyperSDScore",
    "scm": "onestep.objectives.scm:SCM",
    "meanflow": "onestep.objectives.meanflow:MeanFlow",
}

__all__ = ["OBJECTIVES", "Batch", "Objective", "objective_class"]


def objective_class(name: str) -> type[Objective]:
    """The class behind a method's name. Raises ValueError with the nearest name for an unknown one."""
    if name not in OBJECTIVES:
        near = get_close_matches(name, OBJECTIVES, 1)
        hint = f"; did you mean --method {near[0]}?" if near else ""
        raise ValueError(f"no method {name!r}; allowed are {', '.join(OBJECTIVES)}{hint}")
    module, attribute = OBJECTIVES[name].split(":")
    return getattr(import_module(module), attribute)
