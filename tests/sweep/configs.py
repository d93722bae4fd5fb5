"""A tiny configuration of any architecture that transformers knows: settings that mean a size are made small, by name.

Knows which settings need more than that (`MORE`). Does not know what is done with the model.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WIDTH, VOCAB = 64, 96
# What a setting of this name becomes; several names of one value, as architectures name it.
SIZES: dict[Any, str] = {
    WIDTH: "hidden_size d_model n_embd dim embed_dim embedding_size emb_dim embedding_dim word_embed_proj_dim "
    "input_embedding_size output_embedding_size lru_width rel_extent sliding_window sliding_window_size "
    "attention_window_size local_attention "
    # towers of images and sound, and what joins them to the text
    "out_hidden_size output_dim projector_input_dim projector_output_dim projection_dim projector_hidden_size "
    "projection_hidden_dim projection_hidden_size downsample_hidden_size patch_embed_hidden_size decoder_hidden_size "
    "image_text_hidden_size merged_hidden_size text_hidden_size adapter_in_dim adapter_out_dim vision_hidden_size "
    "encoder_hidden_size image_token_embed_dim num_pos_feats output_channels base_channels latent_channels",
    96: "intermediate_size ffn_dim d_ff decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner feed_forward_size "
    "intermediate_size_mlp dense_intermediate_size ffn_hidden_size vocab_size vocab_size_per_layer_input "
    "decoder_vocab_size pronunciation_vocab_size shape_vocab_size mlp_dim num_embeddings "
    "mel_vocab_size alignment_intermediate_size projection_intermediate_size share_expert_dim",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers "
    "num_decoder_layers num_blocks num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok "
    "num_experts_per_token moe_topk moe_k top_k linear_num_key_heads o_groups index_n_heads zero_expert_num "
    "eos_token_id sep_token_id eod_token_id split_ngram_parts depth layers resampler_n_heads",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads attention_heads swa_num_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts index_topk time_step_rank mamba_dt_rank mamba_chunk_size "
    "chunk_size linear_num_value_heads linear_num_heads",
    16: "head_dim attention_head_size dim_head d_head global_head_dim swa_head_dim hidden_size_per_layer_input "
    "q_lora_rank kv_lora_rank qk_nope_head_dim v_head_dim o_lora_rank index_head_dim mamba_d_head mamba_head_dim "
    "linear_key_head_dim linear_value_head_dim linear_head_dim router_hidden_size resampler_dim_head "
    "resampler_head_dim num_position_embeddings position_embedding_size max_num_patches pos_emb_height "
    "pos_emb_width d_kv",
    8: "qk_rope_head_dim mamba_d_state state_size ssm_state_size mamba_n_heads mamba_num_heads laurel_rank hc_lowrank "
    "gated_norm_rank adapter_rank make_ngram_vocab_size_divisible_by d_rel",
    24: "qk_head_dim",
    32: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
    "shared_intermediate_size expert_ffn_hidden_size expert_intermediate_size shared_experts_intermediate_size "
    "ple_embed_dim",
    128: "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length max_target_positions "
    "max_source_positions original_max_position_embeddings codebook_size",
    1: "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group num_expert_group "
    "first_k_dense_replace num_dense_layers mamba_n_groups n_groups num_layers_per_stack bos_token_id "
    "decoder_start_token_id cls_token_id",
    0: "pad_token_id max_window_layers",
    3: "mask_token_id",
    90: "image_token_id image_token_index image_patch_id",
    91: "video_token_id video_token_index",
    92: "audio_token_id audio_token_index",
    93: "boi_token_id vision_start_token_id boi_token_index",
    94: "eoi_token_id vision_end_token_id eoi_token_index",
    97: "ngram_vocab_size_base",
    28: "image_size",
    14: "patch_size",
    None: "unpadded_vocab_size mamba_d_ssm forced_eos_token_id forced_bos_token_id",
}
SMALL = {name: value for value, names in SIZES.items() for name in names.split()}

_DECODER = {"is_decoder": True}
_ALL_HEADS = {"num_key_value_heads": 4}  # latent attention has no shared heads
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_CONV = {"layer_types": ["conv", "full_attention"]}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
_OWN_KEYS = {"global_head_dim": 32, "num_kv_shared_layers": 0}
_ROTARY = {"rotary_dim": 8}
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_IN_SECTIONS = {"rope_parameters": _SECTIONS}
_CODEBOOK = {"base_channels": 32, "channel_multiplier": [1, 1], "attn_resolutions": [3]}
# What an architecture needs beside small sizes: that every kind of its layers is there, and that the sizes fit.
MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert"),
        _DECODER,
    ),
    **dict.fromkeys(("roberta", "roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl"), _DECODER),
    **dict.fromkeys(("axk2", "deepseek_v2", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3"), _ALL_HEADS),
    **dict.fromkeys(("axk1", "deepseek_v3"), _ALL_HEADS | {"head_dim": 8}),
    **dict.fromkeys(("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "olmo_hybrid"), _LINEAR),
    **dict.fromkeys(("bailing_hybrid", "kimi_linear"), _LINEAR | _ALL_HEADS),
    **dict.fromkeys(("lfm2_moe", "lfm3"), _CONV),
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), _SLIDING | _OWN_KEYS),
    **dict.fromkeys(("codegen", "gptj"), _ROTARY),
    **dict.fromkeys(
        ("chameleon_vqgan", "emu3_vqgan", "janus_vqgan"),
        _CODEBOOK,
    ),
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": _DECODER | {"attention_type": "original_full"},
    "cohere_compass_text": _SLIDING
    | {"rope_parameters": {"full_attention": _SECTIONS, "sliding_attention": _SECTIONS}},
    "chameleon": {"vocabulary_map": {"<image>": 90}},
    "cpmant": {
        "prompt_length": 8,
        "prompt_types": 4,
        "segment_types": 4,
        "position_bias_num_buckets": 32,
        "position_bias_max_distance": 128,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_ocr2_text": _ALL_HEADS | {"mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma_text": _SLIDING | _OWN_KEYS | {"top_k_experts": 2},
    "dots3_note_text": _ALL_HEADS | {"layer_types": ["indexed_attention"] * 2},
    "emu3": {"vocabulary_map": {"<image>": 90, "<|extra_200|>": 91}},
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_layer_end_index": 1},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "ffn_hidden_size": 256},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": _SLIDING
    | {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0], "intermediate_size": [96, 96]},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 64},
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},
    "gpt_oss": _SLIDING,
    "glm5_next_text": _ALL_HEADS | _LINEAR | {"index_kpool": 2, "qk_rope_head_dim": 0},
    "granite4_vision": {"deepstack_layer_map": [[1, 0]], "downsample_rate": "1/2", "spatial_target_layers": [0]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hrm_text": {"num_layers_per_stack": None},
    "inkling2_text": {"unpadded_vocab_size": VOCAB},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "jetmoe": {"kv_channels": 16},
    "laguna": {"num_attention_heads_per_layer": None},
    "lfm2": _CONV | {"full_attn_idxs": [1], "block_auto_adjust_ff_dim": False},
    "llama4_text": {"moe_layers": [1], "interleave_moe_layer_step": 2, "attention_chunk_size": 64},
    "longcat_flash": _ALL_HEADS | {"num_layers": 1, "head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "mistral4": _ALL_HEADS | {"qk_rope_head_dim": 8, "head_dim": 24},
    "mistral_large4_text": _ALL_HEADS,
    "molmo2_adapter": {"vision_feature_layers": [0, 1], "vision_feature_layer": [0, 1]},
    "minimax": _LINEAR | {"block_size": 4},
    "muse_spark_audio": {"num_hidden_layers": 2, "patch_sizes": [4, 4], "hidden_sizes": [16, 16], "depths": [1, 1]},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe", "mlp"],
        "num_hidden_layers": 4,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
    },
    **dict.fromkeys(
        (
            "qwen2_vl_text",
            "qwen2_5_vl_text",
            "glm4v_text",
            "glm_ocr_text",
            "cosmos3_edge_text",
            "hunyuan_vl_text",
            "paddleocr_vl_text",
            "qwen2_5_omni_text",
        ),
        _IN_SECTIONS,
    ),
    "glm4v_moe_text": {"rope_parameters": _SECTIONS | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}},
    "ernie4_5_vl_moe_text": {"rope_parameters": _SECTIONS | {"mrope_section": [3, 3, 2]}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 93, "vision_end_token_id": 94},
    "qwen4_exp_text": _LINEAR
    | {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "radio": {"video_temporal_patch_size": 2},
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [32, 32],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "roc_bert": _DECODER | {"enable_pronunciation": False, "enable_shape": False},
    "rwkv": {"attention_hidden_size": WIDTH},
    "xlm": {"causal": True, "emb_dim": WIDTH},
    "xlstm": {
        "num_heads": 4,
        "chunk_size": 64,
        "mode": "inference",
        "num_blocks": 2,
        "head_dim": None,
        "qk_dim_factor": 1.0,
        "return_last_states": True,
    },
    "xmod": _DECODER | {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "layers_block_type": ["mamba", "mamba", "hybrid"] * 2,
        "mamba_dt_rank": 4,
        "n_mamba_heads": 2,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "num_hidden_layers": 3,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "kv_channels": 32,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "hybrid_layer_ids": [1],
        "num_mem_blocks": 1,
        "use_mamba_kernels": False,
        "num_query_groups": 4,
    },
    # transformers 5 zeroes the padding token's row of whatever it loads
    "youtu": _ALL_HEADS | {"head_dim": 8, "pad_token_id": None},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str) -> Any:
    """A configuration of this architecture with a width of 64, two layers and 96 tokens where its settings have names
    that are known. Raises whatever the configuration's class does where they do not fit."""
    cls = CONFIG_MAPPING[model_type]
    settings = _settings(cls, MORE.get(model_type, {}), None)
    while True:
        try:
            return cls(**settings)
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if not unknown or unknown[1] not in settings:
                raise
            settings.pop(unknown[1])


def _settings(cls: Any, more: dict[str, Any], default: Any) -> dict[str, Any]:
    default = default if default is not None else _default(cls)
    names = set(inspect.signature(cls.__init__).parameters) | set(getattr(cls, "__dataclass_fields__", {}))
    if default is not None:
        names |= set(default.to_dict()) | set(vars(default))
    settings = {name: value for name, value in SMALL.items() if name in names}
    for name in list(settings):  # one value a layer, or a whole section, is not a size
        if isinstance(_value(default, name), list | dict):
            settings.pop(name)
    for name, inner in vars(default).items() if default is not None else ():
        if isinstance(inner, transformers.PretrainedConfig) and name not in more:
            kind = {"model_type": inner.model_type} if inner.model_type else {}
            settings[name] = kind | _settings(type(inner), MORE.get(inner.model_type, {}), inner)
    return settings | more


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # a setting that differs between layers and has no one value
        return None


def _default(cls: Any) -> Any:
    try:
        return cls()
    except Exception:  # some configurations cannot be made without arguments
        return None
