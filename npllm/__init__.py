"""npllm: the Phi-3 family of language models as plain NumPy and CuPy functions, with the mathematics in the open.

    import npllm
    model = npllm.load()                                  # the default checkpoint, fetched on first use
    print(model.generate("The capital of France is"))

The words for axes, the same in every docstring and error:

    n_batch, n_seq       sequences; tokens of this call
    n_ctx                keys visible: cached + this call
    n_head, n_kv_head    query heads; key/value heads        num_attention_heads, num_key_value_heads in config.json
    n_layer, n_vocab                                         num_hidden_layers, vocab_size
    d_model, d_head      width of the residual stream; of a head             hidden_size, head_dim
    d_ff                 width of the feed-forward network                   intermediate_size
    d_rope               rotated part of a head                              d_head * partial_rotary_factor
    n_pos, n_label       rows of a position table; classes of a classifier   max_position_embeddings, num_labels
    n_group, n_split     key/value heads after pooling; parts of a result

`n_` counts things, `d_` is the width of a vector.  Queries, keys and values are [n_batch, n_head, n_seq, d_head]: heads before
positions.  Weights are [d_out, d_in], as in the checkpoint.
"""

from npllm import beam, cost, ops, packing, score, steps
from npllm.bert_config import BertConfig
from npllm.config import Config
from npllm.encoder import Encoder
from npllm.errors import NpllmError
from npllm.generate import next_token_distribution
from npllm.model import Model, load, pipeline
from npllm.tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = ["BertConfig", "Config", "Encoder", "Model", "NpllmError", "Tokenizer", "beam", "cost", "load", "next_token_distribution",
           "ops", "packing", "pipeline", "score", "steps"]
