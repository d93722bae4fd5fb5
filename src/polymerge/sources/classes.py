"""Which class of transformers a checkpoint is opened with, and which checkpoints are no language models of one text.

A configuration names the class that saved it. Some types have two classes, one that reads text alone and one that reads
images or sound as well: the one that is named is the right one, since it has a place for every tensor. Knows
transformers' own tables; reads no weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .checkpoint import architecture_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# transformers' classes that open language models, the likeliest first; each has a table: model type -> class.
OPENERS = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",  # sound
}
# Tables of what no bundle holds, and what a class that is named there is.
OTHERS = {
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "an encoder-decoder",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": "an encoder-decoder",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "a masked language model",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "a classifier",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "a classifier",
    "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES": "a classifier",
    "MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES": "a classifier",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "a model that marks answers in a text",
}


def opener_of(config: PretrainedConfig) -> Any:
    """transformers' auto class that opens a checkpoint of this configuration as the class that saved it."""
    import transformers

    return getattr(transformers, _opener(config.model_type, architecture_of(config.to_dict())))


def class_for(config: PretrainedConfig) -> Any:
    """The class of the model itself. Raises KeyError where transformers knows none."""
    return opener_of(config)._model_mapping[type(config)]


def out_of_scope(config: Mapping[str, Any]) -> str | None:
    """What a checkpoint of this config.json is instead of a language model that goes on with a text; None where it is
    one, or where the installed transformers does not know it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind, named = str(config.get("model_type")), architecture_of(config)
    causal, *more = (_table(name) for name in OPENERS.values())
    if named in _classes(causal):
        return None
    if not any(named in _classes(table) for table in more):
        for name, what in OTHERS.items():
            if named in _classes(_table(name)):
                return what
    if kind not in CONFIG_MAPPING_NAMES:
        return None
    if config.get("is_encoder_decoder") or (kind not in causal and _is_encoder_decoder(kind)):
        return "an encoder-decoder"
    return None if any(kind in table for table in (causal, *more)) else "no causal language model"


def _opener(kind: str | None, named: str) -> str:
    tables = {opener: _table(name) for opener, name in OPENERS.items()}
    saved = (opener for opener, table in tables.items() if table.get(kind) == named)
    usual = (opener for opener, table in tables.items() if kind in table)
    return next(saved, None) or next(usual, "AutoModelForCausalLM")


def _is_encoder_decoder(kind: str) -> bool:
    """Whether a type is one where its configuration says nothing."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return getattr(CONFIG_MAPPING[kind], "is_encoder_decoder", False) is True


def _table(name: str) -> dict[Any, Any]:
    from transformers.models.auto import modeling_auto

    return dict(getattr(modeling_auto, name))


def _classes(table: Mapping[Any, Any]) -> set[str]:
    classes = (names if isinstance(names, tuple) else (names,) for names in table.values())
    return {name for names in classes for name in names}
