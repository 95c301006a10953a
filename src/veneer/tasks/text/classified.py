"""Tasks whose answers are classes with names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from veneer.data.row_files import Row
from veneer.tasks.base.task import Task
from veneer.tasks.text import classes


class Classified(Task):
    """A task with one class per row; `classes`: their names in the order of the model's outputs."""

    classes: tuple[str, ...]

    def decided(self, rows: Iterable[Row]) -> dict[str, Any]:
        return {"labels": self.classes or classes.decided(list(rows))}

    @classmethod
    def head_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"num_labels": len(options["labels"])}

    def model_options(self) -> dict[str, Any]:
        named = dict(enumerate(self.classes))
        ids = {name: i for i, name in named.items()}
        return {**super().model_options(), "id2label": named, "label2id": ids}
