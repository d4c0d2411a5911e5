"""llama.cpp through its C API, for the scripts that compare airstream with it.

Needs PyPI llama-cpp-python and numpy. On x86-64 the wheel is built on this machine; name the
instruction sets, because a native build may take the AMX path, which dies with SIGILL where the
operating system does not grant it (leave out what /proc/cpuinfo does not list):

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON \
      -DGGML_BMI2=ON -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_VBMI=ON \
      -DGGML_AVX512_BF16=ON" python3 -m pip install --no-binary llama-cpp-python llama-cpp-python numpy

The Python class Llama is not used: its eval() copies all logits, and it decides about
beginning-of-text tokens and batches by itself.
"""

import ctypes

import llama_cpp
import numpy as np

VERSION = llama_cpp.__version__


class Model:
    """One model with one context of n_ctx positions; a batch of up to n_batch positions is one ubatch.

    exact=False lets llama.cpp choose its fastest attention, for timing. mapped=True reads the weights where mmap
    puts them, without a repacked copy: what is best where they do not fit in memory.
    """

    def __init__(self, path, n_ctx=512, n_batch=None, threads=2, exact=True, mapped=False):
        # llama.cpp logs to stderr through this callback; keep it alive as long as the model.
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        if mapped:
            params.use_extra_bufts = False
            if hasattr(params, "load_mode"):
                params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
            else:
                params.use_mmap = True
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(self.vocab)
        ctx = llama_cpp.llama_context_default_params()
        ctx.n_ctx = n_ctx
        ctx.n_batch = ctx.n_ubatch = n_batch or n_ctx
        ctx.n_threads = ctx.n_threads_batch = threads
        if exact:
            # The default, "auto", decides per machine; the plain path rounds least.
            ctx.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.n_ctx = n_ctx
        self.ctx = llama_cpp.llama_init_from_model(self.model, ctx)
        if not self.ctx:
            raise SystemExit(f"llama.cpp cannot make a context for {path}")
        self.batch = llama_cpp.llama_batch_init(n_batch or n_ctx, 0, 1)

    def tokenize(self, text, parse_special=False):
        """Token ids of text, with the beginning-of-text token where the model's file asks for one."""
        data = text.encode()
        room = len(data) + 16
        ids = (llama_cpp.llama_token * room)()
        n = llama_cpp.llama_tokenize(self.vocab, data, len(data), ids, room, True, parse_special)
        if n < 0:
            raise SystemExit("llama.cpp cannot tokenize the text")
        return list(ids[:n])

    def clear(self):
        """Forget all positions."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.ctx), False)

    def decode(self, ids, start=0, want="all"):
        """Run ids at positions start.. as one batch. want: "all", "last" or "none" of the logits."""
        b = self.batch
        b.n_tokens = len(ids)
        for i, token in enumerate(ids):
            b.token[i] = token
            b.pos[i] = start + i
            b.n_seq_id[i] = 1
            b.seq_id[i][0] = 0
            b.logits[i] = want == "all" or (want == "last" and i + 1 == len(ids))
        rc = llama_cpp.llama_decode(self.ctx, b)
        if rc != 0:
            raise SystemExit(f"llama_decode failed with {rc} ({len(ids)} tokens at {start}, context {self.n_ctx})")

    def logits(self, i):
        """The logits (vocab_size f32, a copy) of position i of the last batch."""
        row = llama_cpp.llama_get_logits_ith(self.ctx, i)
        return np.ctypeslib.as_array(row, shape=(self.vocab_size,)).copy()

    def close(self):
        """Free the context and the model."""
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.ctx)
        llama_cpp.llama_model_free(self.model)


def log_softmax(logits):
    """Log-probabilities (f64) of one row of logits."""
    x = logits.astype(np.float64)
    x -= x.max()
    return x - np.log(np.exp(x).sum())
