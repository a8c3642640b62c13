"""Teachers: frozen diffusers pipelines seen as denoisers, and the table of those known by name.

A new family of pipelines is a subclass of `Teacher` and a line in FAMILIES of `load.py`; a new checkpoint is a line in
TEACHERS of `table.py`.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy
from .facts import Facts
from .table import ASSETS, TEACHERS, facts_of

if TYPE_CHECKING:
    from .base import Copies, Teacher
    from .dit import DiTTeacher
    from .load import FAMILIES, family_named, load_teacher
    from .pixel import EDMTeacher
else:
    __getattr__ = lazy(
        __name__,
        {
            "Copies": "base",
            "DiTTeacher": "dit",
            "EDMTeacher": "pixel",
            "FAMILIES": "load",
            "Teacher": "base",
            "family_named": "load",
            "load_teacher": "load",
        },
    )

__all__ = [
    "ASSETS",
    "FAMILIES",
    "TEACHERS",
    "Copies",
    "DiTTeacher",
    "EDMTeacher",
    "Facts",
    "Teacher",
    "facts_of",
    "family_named",
    "load_teacher",
]
