"""The recipe of an assessment: which candidates are measured on which fields.

Knows the keys of its YAML file; sources and the file's mistakes are handled as in a merge's recipe. Does not know
models, nor whether a task of the harness exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from ..data.rows import files_by_name
from ..errors import RecipeError
from ..evaluate.tasks import MAX_NEW_TOKENS
from ..naming import check_expert_names
from ..recipe.lines import read_yaml, validated
from ..recipe.merge import DeviceName, DTypeName, Recipe, load_recipe
from ..recipe.numbers import Real, Whole
from ..recipe.source import WrittenSource, anchored

DATA_SUFFIXES = (".jsonl",)
TASK_SUFFIXES = (".yaml", ".yml")


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


# One task of a field: a JSONL file, a YAML file of the harness, or the name of one of its tasks.
Tasks = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_one_or_more), Field(min_length=1)]


class AssessRecipe(BaseModel):
    """Everything that an assessment is told. Unknown keys are refused.

    Attributes:
        candidates: name -> source of every model that might become an expert.
        thinkers: name -> source of models that might think first; of any architecture.
        fields: field -> its tasks. A field's accuracy is the mean over them.
        memory_gb: what the bundle and the thinker must fit into, in GB of 1e9 bytes. None: no limit.
        max_experts: the largest set that is proposed.
        merge: settings of the merge that is planned (`compress_rate`, `embeddings` ...), as in its recipe.
        limit: questions of each task, the first ones.
        num_fewshot: worked examples before each question of the harness's tasks.
        chat_template: whether questions go through the candidate's chat template.
        by_length: choose among `choices` by the log-likelihood of every character.
        include_path: a folder of the harness's task YAML files.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    candidates: dict[str, WrittenSource]
    thinkers: dict[str, WrittenSource] = {}
    fields: dict[Annotated[str, Field(min_length=1)], Tasks]
    memory_gb: Annotated[Real, Field(gt=0)] | None = None
    max_experts: Annotated[Whole, Field(ge=1)] | None = None
    merge: dict[str, Any] = {}
    limit: Annotated[Whole, Field(ge=1)] | None = None
    num_fewshot: Annotated[Whole, Field(ge=0)] | None = None
    max_new_tokens: Annotated[Whole, Field(ge=1)] = MAX_NEW_TOKENS
    chat_template: bool = True
    by_length: bool = False
    include_path: str | None = None
    device: DeviceName = "auto"
    dtype: DTypeName | None = None
    batch_tokens: Annotated[Whole, Field(ge=1)] = 4096
    trust_remote_code: bool = False

    @field_validator("candidates", "thinkers")
    @classmethod
    def _names_are_safe(cls, named: dict[str, Any]) -> dict[str, Any]:
        check_expert_names(named)
        return named

    @field_validator("candidates", "fields")
    @classmethod
    def _is_not_empty(cls, named: dict[str, Any]) -> dict[str, Any]:
        if not named:
            raise ValueError("must not be empty")
        return named

    @model_validator(mode="after")
    def _roles_differ(self) -> AssessRecipe:
        both = self.candidates.keys() & self.thinkers.keys()
        if both:
            raise ValueError(f"{sorted(both)[0]!r} is a candidate and a thinker; give the thinker a name of its own")
        self.merge_recipe(["a", "b"])  # checks `merge`
        return self

    def merge_recipe(self, names: list[str]) -> Recipe:
        """The recipe of a merge of these candidates; placeholders stand for names that are none."""
        sources = {name: self.candidates.get(name, {"source": "."}) for name in names}
        settings = {"trust_remote_code": self.trust_remote_code, **self.merge}
        try:
            return load_recipe({**settings, "experts": sources})
        except RecipeError as error:
            raise ValueError(f"merge: {str(error).removeprefix('recipe: ')}") from None


def load_assess_recipe(
    source: str | Path | dict[str, Any], data: str | Path | None = None, **changes: Any
) -> AssessRecipe:
    """A checked recipe from a YAML file or a dict: an assessment's, or a merge's, whose experts are the candidates.

    Relative paths in a file are taken from its own folder.

    Args:
        data: a folder whose every NAME/test.jsonl is a field, beside those of the recipe.
        changes: keys to set instead of the recipe's.

    Raises:
        RecipeError: one line, with the file and the line of the mistake where there is a file.
    """
    if isinstance(source, dict):
        return validated(AssessRecipe, _with_data(source, data, changes), where="recipe", lines={})
    path = Path(source)
    written, lines = read_yaml(path)
    if isinstance(written, dict) and "experts" in written and "candidates" not in written:
        experts = load_recipe(path)
        merge = experts.model_dump(exclude={"experts", "device", "trust_remote_code"}, exclude_defaults=True)
        as_assessment = {
            "candidates": experts.experts,
            "merge": merge,
            "device": experts.device,
            "trust_remote_code": experts.trust_remote_code,
        }
        return validated(AssessRecipe, _with_data(as_assessment, data, changes), where=str(path), lines={})
    recipe = validated(AssessRecipe, _with_data(written, data, changes), where=str(path), lines=lines)
    return _anchored(recipe, path.parent)


def _with_data(written: Any, data: str | Path | None, changes: Mapping[str, Any]) -> Any:
    if not isinstance(written, Mapping):
        return written
    fields = written.get("fields") or {}
    if data is not None and isinstance(fields, Mapping):
        fields = {**fields, **{name: str(file.absolute()) for name, file in files_by_name(Path(data)).items()}}
    if not fields:
        raise RecipeError("no fields to assess; say `fields:` in the recipe, or give a folder of data with --data")
    return {**written, "fields": fields, **changes}


def _anchored(recipe: AssessRecipe, folder: Path) -> AssessRecipe:
    def task(text: str) -> str:
        is_file = text.endswith((*DATA_SUFFIXES, *TASK_SUFFIXES))
        return str(folder / Path(text).expanduser()) if is_file else text

    include = recipe.include_path
    return recipe.model_copy(
        update={
            "candidates": {name: anchored(source, folder) for name, source in recipe.candidates.items()},
            "thinkers": {name: anchored(source, folder) for name, source in recipe.thinkers.items()},
            "fields": {name: tuple(task(text) for text in tasks) for name, tasks in recipe.fields.items()},
            "include_path": str(folder / Path(include).expanduser()) if include else None,
        }
    )
