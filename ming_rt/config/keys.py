"""Keys of upstream's config files that do not reach the arithmetic."""

from __future__ import annotations

# Stored by upstream, without effect on inference (or, for flash, fixed in code whatever the file says).
_UNUSED_KEYS = """
    _attn_implementation _name_or_path add_cross_attention architectures attention_dropout auto_map
    bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping embedding_dropout
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id hidden_act id2label in_chans initializer_range is_decoder
    is_encoder_decoder label2id length_penalty max_length max_window_layers min_length model_type
    moe_router_topk_scaling_factor multi_gate no_repeat_ngram_size norm_head norm_softmax norm_topk_prob
    num_beam_groups num_beams num_return_sequences output_attentions output_dropout output_hidden_states
    output_router_logits output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate router_dtype
    router_type sep_token_id sliding_window spatial_patch_size suppress_tokens talker_config
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings
    tokenizer_class tokens_per_second top_k top_p torch_dtype torchscript transformers_version
    typical_p use_bfloat16 use_cache use_expert_bias use_qk_norm use_sliding_window
"""
UNUSED = frozenset(_UNUSED_KEYS.split())
