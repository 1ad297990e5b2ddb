"""The engines that bench.py measures, each behind the same two methods: `reset()` and `feed(ids)`.

`feed` sends token ids [n_batch, n_seq] through the model after those that it was fed before, and
computes the logits of the last one of each row.  Every contender gets the same checkpoint, the same
ids and the same number of threads.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

Array = Any

N_CTX = 8192
N_CTX_ONNX = 4096  # its caches are as long as they may become


class Npllm:
    """The library itself; `dtype` of the weights, and optionally the set of operations: "bfloat16",
    "bfloat16/tiled"; or what activations are rounded to: "int8+int16".  A type of GGUF
    files, "q4_0", is read from a file of that type.
    """

    def __init__(self, folder: Any, dtype: str) -> None:
        import npllm
        from npllm import kernels, ops

        dtype, _, activations = dtype.partition("+")
        dtype, _, name = dtype.partition("/")
        sets = {"": None, "tiled": kernels.tiled_ops(), "blockwise": ops.blockwise}
        if str(folder).endswith(".gguf") or dtype in block_types():
            folder, dtype = gguf_file(folder, dtype), None
        self.model, self.version = (
            npllm.load(
                folder, dtype=dtype or None, ops=sets[name], activations=activations or None
            ),
            npllm.__version__,
        )
        self.reset()

    def reset(self, n_batch: int = 1) -> None:
        self.cache = self.model.new_cache(n_batch)

    def feed(self, ids: Array) -> Array:
        return self.model(ids, cache=self.cache, logits_to_keep=1)[:, -1]


class Transformers:
    """Hugging Face Transformers on PyTorch."""

    def __init__(self, folder: Any, dtype: str) -> None:
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        self.torch, self.transformers, self.version = torch, transformers, transformers.__version__
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        )
        self.reset()

    def reset(self, _n_batch: int = 1) -> None:
        self.cache = self.transformers.DynamicCache(config=self.model.config)

    def feed(self, ids: Array) -> Array:
        with self.torch.inference_mode():
            output = self.model(
                self.torch.from_numpy(ids), past_key_values=self.cache, logits_to_keep=1
            )
        return output.logits[:, -1].float().numpy()


class LlamaCpp:
    """llama.cpp through llama-cpp-python's C interface, on a GGUF file of the same weights.

    LLAMA_CPP_EXTRA_BUFFERS=0 declines its buffers for Intel AMX, with which some builds end in an
    illegal instruction.
    """

    def __init__(self, folder: Any, dtype: str) -> None:
        import llama_cpp

        self.api, self.version = llama_cpp, llama_cpp.__version__
        threads = int(os.environ["OMP_NUM_THREADS"])
        with quiet_stderr():
            llama_cpp.llama_backend_init()
            settings = llama_cpp.llama_model_default_params()
            settings.n_gpu_layers = 0
            settings.use_extra_bufts = os.environ.get("LLAMA_CPP_EXTRA_BUFFERS", "1") != "0"
            self.model = llama_cpp.llama_model_load_from_file(
                os.fsencode(gguf_file(folder, dtype)), settings
            )
            settings = llama_cpp.llama_context_default_params()
            settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = (
                N_CTX,
                2048,
                512,
                16,
            )
            settings.n_threads = settings.n_threads_batch = threads
            settings.kv_unified = True
            self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(2048, 0, 1)
        self.reset()

    def reset(self, _n_batch: int = 1) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.n_past = 0

    def feed(self, ids: Array) -> Array:
        last = []
        for start in range(0, ids.shape[1], 2048 // len(ids)):
            last = self._decode(ids[:, start : start + 2048 // len(ids)])
        return np.stack(
            [
                np.ctypeslib.as_array(
                    self.api.llama_get_logits_ith(self.context, at), (self.n_vocab,)
                )
                for at in last
            ]
        )

    def _decode(self, ids: Array) -> list[int]:
        batch, n_seq = self.batch, ids.shape[1]
        batch.n_tokens = ids.size
        for at in range(ids.size):
            row, column = divmod(at, n_seq)
            batch.token[at], batch.pos[at] = int(ids[row, column]), self.n_past + column
            batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = 1, row, column == n_seq - 1
        if self.api.llama_decode(self.context, batch):
            raise SystemExit("llama_decode failed")
        self.n_past += n_seq
        return [(row + 1) * n_seq - 1 for row in range(len(ids))]


class OnnxGenai:
    """onnxruntime-genai, on what its builder made of the folder: FOLDER/onnxruntime-DTYPE."""

    def __init__(self, folder: Any, dtype: str) -> None:
        import onnxruntime_genai

        self.api, self.version = onnxruntime_genai, onnxruntime_genai.__version__
        made = onnxruntime_genai.Config(os.path.join(folder, f"onnxruntime-{dtype}"))
        threads = {"intra_op_num_threads": int(os.environ["OMP_NUM_THREADS"])}
        made.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        self.model = onnxruntime_genai.Model(made)
        self.reset()

    def reset(self, n_batch: int = 1) -> None:
        """Forget every token."""
        settings = self.api.GeneratorParams(self.model)
        settings.set_search_options(max_length=N_CTX_ONNX, batch_size=n_batch)
        self.generator = self.api.Generator(self.model, settings)

    def feed(self, ids: Array) -> Array:
        """Compute the logits after more tokens."""
        self.generator.append_tokens(ids.astype(np.int32))
        return self.generator.get_logits()[:, -1]


class OpenVino:
    """OpenVINO, on what optimum-intel exported of the folder: FOLDER/openvino-DTYPE.

    "bfloat16+bfloat16": inference precision bfloat16; else float32.  Activations of int8 and int4
    weights are rounded to int8 in groups of 128, or of OPENVINO_GROUP; 0: not at all.
    """

    def __init__(self, folder: Any, dtype: str) -> None:
        import openvino

        dtype, _, activations = dtype.partition("+")
        self.version = openvino.__version__.partition("-")[0]
        settings = {
            "INFERENCE_NUM_THREADS": int(os.environ["OMP_NUM_THREADS"]),
            "INFERENCE_PRECISION_HINT": "bf16" if activations == "bfloat16" else "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": int(os.environ.get("OPENVINO_GROUP", "128")),
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_HYPER_THREADING": True,  # or it uses one thread a core, whatever it is told
        }
        path = os.path.join(folder, f"openvino-{dtype}", "openvino_model.xml")
        self.request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
        self.names = {name for x in self.request.model_inputs for name in x.names}
        self.reset()

    def reset(self, _n_batch: int = 1) -> None:
        self.request.reset_state()
        self.n_past = 0

    def feed(self, ids: Array) -> Array:
        n_batch, n_seq = ids.shape
        self.n_past += n_seq
        positions = np.arange(self.n_past - n_seq, self.n_past)
        inputs = {
            "input_ids": ids.astype(np.int64),
            "attention_mask": np.ones((n_batch, self.n_past), np.int64),
            "position_ids": np.broadcast_to(positions, ids.shape),
            "beam_idx": np.arange(n_batch, dtype=np.int32),
        }
        self.request.infer({name: x for name, x in inputs.items() if name in self.names})
        return self.request.get_tensor("logits").data[:, -1]


class quiet_stderr:
    """Keep what C code writes to standard error to itself."""

    def __enter__(self) -> None:
        self.saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)

    def __exit__(self, *_: object) -> None:
        os.dup2(self.saved, 2)
        os.close(self.saved)


GGUF_TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "int8": "q8_0"}
GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "qkv_proj": "attn_qkv",
    "o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "gate_up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def block_types() -> list[str]:
    """Types of GGUF files whose matrices are in blocks."""
    from npllm.checkpoints.gguf.tensor_types import FILE_TYPES

    return [name for name in FILE_TYPES if name.startswith("q")]


def gguf_file(folder: Any, dtype: str) -> Path:
    """Write the weights of a Phi-3 folder as a GGUF file beside them, once; its
    vocabulary means nothing, since ids come and logits go.  A file is what it is.
    """
    if str(folder).endswith(".gguf"):
        return Path(folder)
    path = Path(folder) / f"bench-{dtype}.gguf"
    if not path.exists():
        partial = path.with_suffix(".partial")
        write_gguf(Path(folder), partial, dtype)
        partial.rename(path)
    return path


def write_gguf(folder: Path, path: Path, dtype: str) -> None:
    """Write one GGUF file: norms in float32, every matrix in the type that llama.cpp chooses in a
    file of the type asked for.
    """
    import gguf

    from npllm.checkpoints.gguf.tensor_types import ModelSizes, file_type_named, tensor_type
    from npllm.checkpoints.phi3_layout import load_params
    from npllm.config.config import Config
    from npllm.models import rope

    config = Config.from_json(folder)
    params = load_params(folder, config)
    wanted = file_type_named(GGUF_TYPES.get(dtype, dtype))
    sizes = ModelSizes(
        config.num_hidden_layers,
        config.tie_word_embeddings,
        config.num_attention_heads != config.num_key_value_heads,
    )
    writer = gguf.GGUFWriter(path, "phi3", use_temp_file=False)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(2 * len(rope.frequencies(config, 0)))
    writer.add_rope_freq_base(config.rope_parameters.rope_theta)
    writer.add_rope_scaling_attn_factors(rope.attention_factor(config))
    add_vocabulary(writer, config.vocab_size)
    writer.add_file_type(wanted.number)
    plain = config.rope_parameters.rope_theta ** (
        -np.arange(0, 1, 1 / len(rope.frequencies(config, 0)))
    )
    for choice, name in enumerate(("rope_factors_short", "rope_factors_long")):
        if rope.attention_factor(config) != 1:
            writer.add_tensor(
                f"{name}.weight", (plain / rope.frequencies(config, choice)).astype(np.float32)
            )

    def add(name: str, x: Array) -> None:
        kind = gguf.GGMLQuantizationType[tensor_type(name, x.shape, wanted, sizes)]
        rounded = rounded_to(x, kind)
        writer.add_tensor(name, rounded, raw_dtype=kind if x.ndim > 1 else None)

    add("token_embd.weight", params.embed_tokens)
    for number, layer in enumerate(params.layers):
        for field, name in GGUF_LAYER.items():
            add(f"blk.{number}.{name}.weight", getattr(layer, field))
    add("output_norm.weight", params.norm)
    add("output.weight", params.lm_head)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer: Any, n_vocab: int) -> None:
    """Write a SentencePiece vocabulary whose tokens stand for nothing."""
    import gguf

    control, byte, normal = (
        gguf.TokenType.CONTROL,
        gguf.TokenType.BYTE,
        gguf.TokenType.NORMAL,
    )
    known = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    tokens = [*known, *(f"t{n}" for n in range(len(known), n_vocab))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * n_vocab)
    writer.add_token_types(
        [gguf.TokenType.UNKNOWN, control, control, *[byte] * 256]
        + [normal] * (n_vocab - len(known))
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


ROUNDED_ROWS = 256  # of a matrix in blocks; the rest repeats them, whose scales take a search each


def rounded_to(x: Array, kind: Any) -> Array:
    """A tensor in a type of GGUF: blocks of a matrix's first rows, again and again."""
    from gguf.quants import quantize

    from npllm.quantized.block_formats import FORMATS
    from npllm.quantized.block_packing import quantize_blocks

    if x.ndim == 1 or kind.name not in FORMATS:
        wide = np.asarray(x).astype(np.float32)
        return wide if x.ndim == 1 else quantize(wide, kind)
    blocks = quantize_blocks(np.asarray(x[:ROUNDED_ROWS]), kind.name).blocks
    return np.resize(blocks, (len(x), blocks.shape[1]))


CONTENDERS = {
    "npllm": Npllm,
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
    "onnxruntime": OnnxGenai,
    "openvino": OpenVino,
}
PACKAGES = {
    "npllm": "npllm",
    "transformers": "torch, transformers",
    "llama.cpp": "llama_cpp, gguf",
    "onnxruntime": "onnxruntime_genai",
    "openvino": "openvino",
}


def installed(name: str) -> bool:
    """Tell whether everything that a contender needs can be imported."""
    probe = subprocess.run(
        [sys.executable, "-c", f"import {PACKAGES[name]}"], capture_output=True, check=False
    )
    return probe.returncode == 0
