"""python -m onestep.replay: repeat the step of a run that was not finite, and name its first tensor that is not."""

import sys
from collections.abc import Sequence
from pathlib import Path

from .cli import Parser
from .saved import saved_options

BATCHES = "nonfinite"
"""Folder in a run's with the batches of steps that were not finite."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: exit code 0 where the step is finite this time, 1 where not, 2 for bad input."""
    reader = Parser(prog="python -m onestep.replay", description="Repeat the step of a run that was not finite.")
    reader.add_argument("run", type=Path, metavar="RUN", help="folder of a run of onestep.train")
    reader.add_argument("--batch", type=Path, metavar="FILE", help=f"default: the newest in RUN/{BATCHES}")
    given = reader.parse_args(argv)
    try:
        saved_options(given.run)  # what is no run is told before torch is imported
        path = given.batch or max((given.run / BATCHES).glob("step-*.safetensors"), default=None)
        if path is None:
            raise ValueError(f"{given.run} has no step that was not finite: there is no batch in {given.run / BATCHES}")
        from .nonfinite import NonFinite
        from .replaying import WithBatch, read_batch, repeat, trainer_of

        step, conditions, real = read_batch(path)
        trainer = trainer_of(given.run)
        trainer.data = WithBatch(trainer.data, step, conditions, real)
        found = repeat(trainer, NonFinite("", step))
    except (ValueError, OSError) as error:
        reader.error(str(error))
    print(f"step {trainer.step + 1}: {found}" if found else f"step {step + 1} is finite")
    return int(found is not None)


if __name__ == "__main__":
    sys.exit(main())
