"""Stage 1, what to solve: problems from files, the Hub, reasoning-gym or science questions; split, order and prompts.

check(config)                                  refuses what no source can be, before anything is read
load(config, seed=0, say=print) -> Dataset     train, held-out and shots, disjoint by content
Cursor(dataset.train, seed=0)                  endless order over the training problems, resumed exactly
Renderer(tokenizer, config, dataset.shots)     the only maker of prompts, the student's and the teacher's
fit(dataset, renderer, say=print) -> Dataset   what to do with prompts over `max_prompt_length`
read(source, split, given) -> rows             a source as it is; to_problems(source, rows, columns) reads them
"""

from __future__ import annotations

from selftaught.data.columns import to_problems
from selftaught.data.config import DataConfig, Part
from selftaught.data.cursor import Cursor
from selftaught.data.files import read
from selftaught.data.render import Renderer, fit
from selftaught.data.split import Dataset, check, load

__all__ = ["Cursor", "DataConfig", "Dataset", "Part", "Renderer", "check", "fit", "load", "read", "to_problems"]
