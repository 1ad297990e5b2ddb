"""config.json to frozen, validated dataclasses.

Belongs here: which keys exist, their types and ranges; strict reading of any JSON file.
Does not belong here: weights (checkpoints/), how a value is used (models/).
"""

from npllm.config.bert_config import BertConfig
from npllm.config.config import Config
from npllm.config.rope_parameters import RopeParameters
from npllm.config.strict_json import read_json

__all__ = ["BertConfig", "Config", "RopeParameters", "read_json"]
