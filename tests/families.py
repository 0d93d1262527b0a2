"""Tiny decoders of Hugging Face, one of each family, from configurations alone: seeded weights, no network.

They differ in what families differ in: norms before, after, or around the sublayers, positions added, rotated by or
subtracted from scores, keys and values shared, fused, normalised, attention with a window or a cap, MLPs gated, beside
attention, or many of which a token takes two. Sizes are chosen so that a model is neither nearly linear nor saturated:
attention is far from uniform and from one-hot, and so is the prediction.
"""

import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import transformers as hf
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:  # TransformerLens 4 has no such class
    from transformer_lens import HookedTransformer

D_VOCAB = 48
N_CTX = 64

VOCABULARY: dict[str, Any] = {"vocab_size": D_VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2: dict[str, Any] = {**VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": N_CTX}
PLAIN: dict[str, Any] = {
    **VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": N_CTX,
}
NEOX: dict[str, Any] = {**PLAIN, "intermediate_size": 40, "rotary_pct": 0.5, "tie_word_embeddings": False}
UNGROUPED: dict[str, Any] = {**PLAIN, "intermediate_size": 40, "tie_word_embeddings": False}
LLAMA: dict[str, Any] = {**UNGROUPED, "num_key_value_heads": 2}
GEMMA: dict[str, Any] = {**LLAMA, "head_dim": 16, "tie_word_embeddings": True}
GEMMA_LOCAL: dict[str, Any] = {**GEMMA, "num_hidden_layers": 4, "sliding_window": 4, "query_pre_attn_scalar": 24}
FALCON: dict[str, Any] = {
    **PLAIN,
    "ffn_hidden_size": 40,
    "new_decoder_architecture": False,
    "tie_word_embeddings": True,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_experts": 4}
HALF_ROTATED: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
}
LLAMA3_ROTATED: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
}

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "gpt2": lambda: hf.GPT2Config(**GPT2),
    "gpt-neo": lambda: hf.GPTNeoConfig(
        **VOCABULARY,
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=4,
        max_position_embeddings=N_CTX,
    ),
    "gpt-j": lambda: hf.GPTJConfig(**GPT2, rotary_dim=4),
    "opt": lambda: hf.OPTConfig(**PLAIN, ffn_dim=40, word_embed_proj_dim=32, do_layer_norm_before=True),
    "pythia": lambda: hf.GPTNeoXConfig(**NEOX),
    "neox-sequential": lambda: hf.GPTNeoXConfig(**NEOX, use_parallel_residual=False),
    "llama2": lambda: hf.LlamaConfig(**UNGROUPED),
    "llama3": lambda: hf.LlamaConfig(**LLAMA, **LLAMA3_ROTATED),
    "mistral": lambda: hf.MistralConfig(**LLAMA, head_dim=8, sliding_window=4),
    "qwen2": lambda: hf.Qwen2Config(**LLAMA),
    "qwen2.5": lambda: hf.Qwen2Config(**{**LLAMA, "tie_word_embeddings": True}),
    "qwen3": lambda: hf.Qwen3Config(**LLAMA, head_dim=16),
    "phi2": lambda: hf.PhiConfig(**UNGROUPED, **HALF_ROTATED),
    "phi3": lambda: hf.Phi3Config(**LLAMA),
    "gemma1": lambda: hf.GemmaConfig(**{**GEMMA, "num_key_value_heads": 1}),
    "gemma2": lambda: hf.Gemma2Config(**GEMMA_LOCAL, attn_logit_softcapping=3.0, final_logit_softcapping=6.0),
    "gemma3": lambda: hf.Gemma3TextConfig(**GEMMA_LOCAL, layer_types=["sliding_attention", "full_attention"] * 2),
    "olmo2": lambda: hf.Olmo2Config(**UNGROUPED),
    "olmo2-grouped": lambda: hf.Olmo2Config(**LLAMA),
    "stablelm": lambda: hf.StableLmConfig(**LLAMA, **HALF_ROTATED, use_qkv_bias=True),
    "falcon": lambda: hf.FalconConfig(**FALCON, multi_query=True, parallel_attn=True, bias=False, alibi=False),
    "falcon-rw": lambda: hf.FalconConfig(**FALCON, multi_query=False, parallel_attn=False, bias=True, alibi=True),
    "bloom": lambda: hf.BloomConfig(**VOCABULARY, hidden_size=32, n_layer=3, n_head=4),
    "mixtral": lambda: hf.MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "qwen2-moe": lambda: hf.Qwen2MoeConfig(**LLAMA, **EXPERTS, shared_expert_intermediate_size=24),
    "qwen3-moe": lambda: hf.Qwen3MoeConfig(**LLAMA, **EXPERTS, head_dim=16),
}
"""Configuration of each, by family; those with "-grouped" share keys and values, which others of theirs do not."""

# How much larger matrices are than such as keep the size of what they multiply.
_GAIN = 1.5
_QUERY_KEY_GAIN = {"gpt-neo": 0.9}  # its scores are not divided by the root of d_head
_ROUTER_GAIN = 4.0  # so that rounding does not send a token to another expert
_QUERY_KEY_NORM = 1.5  # mean weight of norms of queries and keys, which would attend almost evenly at 1


def hugging_face(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a family, in eval mode, with attention written out (`eager`)."""
    config = FAMILIES[name]()
    config._experts_implementation = "eager"  # others take float32 at most
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.config.architectures = [type(model).__name__]
    _fill(model, name)
    return model.to(dtype).eval()


def _fill(model: PreTrainedModel, name: str) -> None:
    """Random weights: those of norms about 1, biases about 0, neither exactly so, matrices of a size that matters."""
    generator = torch.Generator().manual_seed(0)
    is_gemma = name.startswith("gemma")  # adds 1 to the weights of norms, and multiplies embeddings by 32**0.5
    filled: set[nn.Parameter] = set()
    with torch.no_grad():
        for path, module in model.named_modules():
            for kind, parameter in module.named_parameters(recurse=False):
                if parameter in filled:  # an unembedding that is the embedding
                    continue
                filled.add(parameter)
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
                if isinstance(module, nn.Embedding):
                    parameter *= 0.35 if model.config.tie_word_embeddings else 0.8
                elif parameter.dim() == 1:
                    parameter *= 0.3
                    if kind == "weight":
                        centre = _QUERY_KEY_NORM if path.endswith(("q_norm", "k_norm")) else 1
                        parameter += centre - 1 if is_gemma else centre
                else:
                    fan_in = parameter.shape[0 if isinstance(module, Conv1D) else -1]
                    parameter *= _gain(path, name) / fan_in**0.5


def _gain(path: str, name: str) -> float:
    if path.endswith(("q_proj", "k_proj")):
        return _QUERY_KEY_GAIN.get(name, _GAIN)
    return _ROUTER_GAIN if path.endswith("mlp.gate") else _GAIN


# -- for TransformerLens 3 ---------------------------------------------------------------------------

# What TransformerLens converts, but knows by official names only: arguments of `HookedTransformerConfig` as it has
# them for those, and its function that converts weights.
_GEMMA: dict[str, Any] = {
    "act_fn": "gelu_pytorch_tanh",
    "normalization_type": "RMS",
    "positional_embedding_type": "rotary",
    "rotary_dim": 16,
    "gated_mlp": True,
    "final_rms": True,
}
_GEMMA_LOCAL: dict[str, Any] = {
    **_GEMMA,
    "use_normalization_before_and_after": True,
    "use_local_attn": True,
    "window_size": 4,
    "attn_types": ["local", "global"] * 2,
    "attn_scale": 24**0.5,
}
_OLMO2: dict[str, Any] = {
    "act_fn": "silu",
    "normalization_type": "RMS",
    "positional_embedding_type": "rotary",
    "rotary_dim": 8,
    "rotary_base": 10000.0,
    "gated_mlp": True,
}
BY_HAND: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma1": ("convert_gemma_weights", _GEMMA),
    "gemma2": (
        "convert_gemma_weights",
        {**_GEMMA_LOCAL, "attn_scores_soft_cap": 3.0, "output_logits_soft_cap": 6.0},
    ),
    "gemma3": (
        "convert_gemma_weights",
        {**_GEMMA_LOCAL, "use_qk_norm": True, "rotary_base": 1000000, "rotary_base_local": 10000},
    ),
    "olmo2": ("convert_olmo2_weights", _OLMO2),
    "olmo2-grouped": ("convert_olmo3_weights", _OLMO2),  # that for OLMo 2 takes keys and values for ungrouped
    "phi2": (
        "convert_phi_weights",
        {
            "act_fn": "gelu_new",
            "normalization_type": "LN",
            "positional_embedding_type": "rotary",
            "rotary_dim": 4,
            "parallel_attn_mlp": True,
        },
    ),
}
UNKNOWN = ("stablelm", "falcon", "falcon-rw", "qwen2-moe", "qwen3-moe")


def hooked(name: str, dtype: torch.dtype = torch.float32) -> "HookedTransformer":
    """The same model as a `HookedTransformer` of TransformerLens 3, its weights as they are.

    Raises:
        NotImplementedError: If TransformerLens 3.9 has no conversion for the family.
    """
    if name in UNKNOWN:
        raise NotImplementedError(f"TransformerLens 3.9 has no HookedTransformer for {name!r}.")
    model = hugging_face(name)
    built = _hooked_by_hand(model, name) if name in BY_HAND else _loaded(model, "hooked")
    built.cfg.model_name = name
    if dtype != torch.float32:
        built.to(dtype, print_details=False)
        for block in built.blocks:  # angles that were never rounded to float32
            if hasattr(block.attn, "rotary_sin"):
                block.attn.rotary_sin, block.attn.rotary_cos = block.attn.calculate_sin_cos_rotary(
                    built.cfg.rotary_dim, len(block.attn.rotary_sin), base=block.attn._rotary_base(), dtype=dtype
                )
    return built.eval()


def bridged(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The same model as a `TransformerBridge` of TransformerLens 3.9 or 4, its weights as they are."""
    model = _loaded(hugging_face(name, dtype), "bridge")
    model.cfg.model_name = name
    return model


def _loaded(model: PreTrainedModel, backend: str) -> Any:
    import tracedensity as td

    shown = hf.utils.logging.is_progress_bar_enabled()
    hf.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if shown:
            hf.utils.logging.enable_progress_bar()
        return td.load_model(folder, device="cpu", dtype=model.dtype, backend=backend)


def _hooked_by_hand(model: PreTrainedModel, name: str) -> "HookedTransformer":
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained import weight_conversions

    config: Any = model.config
    converter, options = BY_HAND[name]
    n_kv_heads = config.num_key_value_heads
    cfg = HookedTransformerConfig(
        model_name=name,
        original_architecture=type(model).__name__,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_key_value_heads=None if n_kv_heads == config.num_attention_heads else n_kv_heads,
        d_head=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        d_mlp=config.intermediate_size,
        n_ctx=config.max_position_embeddings,
        d_vocab=config.vocab_size,
        eps=config.layer_norm_eps if name == "phi2" else config.rms_norm_eps,
        init_weights=False,
        device="cpu",
        dtype=model.dtype,
        **options,
    )
    built = HookedTransformer(cfg, move_to_device=False)
    state = getattr(weight_conversions, converter)(model, cfg)
    built.load_and_process_state_dict(
        state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return built
