"""From load files to an expert map: what `placer experts` does, as functions of their own.

`read_question` turns what a person states into an `ExpertProblem`, `answer` places the experts, `simulate` scores a map.
"""

from placer.experts.placed import Placed, answer, file_of, preview, simulate
from placer.experts.question import Question, Wishes, read_map, read_question

__all__ = [
    "Placed",
    "Question",
    "Wishes",
    "answer",
    "file_of",
    "preview",
    "read_map",
    "read_question",
    "simulate",
]
