"""config.json to frozen, validated dataclasses.

Belongs here: which keys exist, their types and ranges.  Does not: weights (checkpoints/), how a value is used (models/).
"""

from npllm.config.bert_config import BertConfig
from npllm.config.config import Config, RopeParameters, read_json

__all__ = ["BertConfig", "Config", "RopeParameters", "read_json"]
