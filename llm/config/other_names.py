"""Names that other programs use for our settings. An error names ours; the other name is never accepted.

A name may mean something else there (a batch per device, a ratio of steps), so it is not an alias. `ALIASES` in
`settings.py` has nanoGPT's names, which mean the same.
"""

from collections.abc import Container

# Our name, a note about it, and the names in other programs. The first row that the command has a flag for is used. So
# the settings of train come first, and the flags of other commands follow.
NAMES = (
    (
        "max_steps",
        "a run is measured in steps: max_steps = epochs x training tokens / tokens per step, where tokens per step = "
        "batch_size x gradient_accumulation_steps x block_size",
        "epoch epochs num_epochs n_epoch n_epochs nb_epochs max_epochs num_train_epochs",
    ),
    (
        "max_steps",
        "the learning-rate schedule ends there too",
        "steps num_steps n_steps total_steps train_steps training_steps iters iterations num_iterations n_iters "
        "lr_decay_iters",
    ),
    ("max_lr", "the peak learning rate; min_lr is the last one", "lr base_lr peak_lr max_learning_rate initial_lr"),
    ("min_lr", "", "lr_min min_learning_rate end_lr final_lr"),
    (
        "batch_size",
        "windows per micro-batch; a step has batch_size x gradient_accumulation_steps windows, over all devices",
        "batch bs bsz train_batch_size micro_batch_size device_batch_size per_device_train_batch_size "
        "per_device_batch_size total_batch_size global_batch_size",
    ),
    ("order", "replacement or epochs", "sampler sampling shuffle shuffle_data"),
    (
        "gradient_accumulation_steps",
        "",
        "accum grad_accum grad_accum_steps gradient_accumulation accumulation_steps accumulate_grad_batches",
    ),
    (
        "block_size",
        "in tokens",
        "max_seq_length max_seq_len max_sequence_length seq_len seq_length sequence_length context_length context_size "
        "context ctx ctx_len n_ctx n_positions max_position_embeddings",
    ),
    ("n_embd", "", "hidden_size d_model dim model_dim embed_dim emb_dim embedding_dim n_embed width"),
    ("n_layer", "", "num_layers num_hidden_layers depth layers"),
    ("n_head", "", "num_heads num_attention_heads heads"),
    ("ffn_mult", "in units of n_embd", "mlp_ratio"),
    ("ffn_dim", "with --arch llama; ffn_mult, in units of n_embd, is gpt2's", "intermediate_size d_ff ffn_hidden_size"),
    ("arch", "gpt2 or llama", "architecture model_type"),
    ("n_kv_head", "", "n_kv_heads num_key_value_heads num_kv_heads n_query_groups"),
    ("rope_theta", "", "rope_base theta"),
    ("dropout", "", "drop dropout_rate resid_dropout attention_dropout hidden_dropout_prob"),
    ("tied_lm_head", "", "tie_weights tie_embeddings tie_word_embeddings weight_tying"),
    ("vocab_size", "", "vocab n_vocab num_tokens"),
    ("tokenizer", "auto, gpt2, bpe, byte or char", "tokenizer_name tokenizer_path tokenizer_type"),
    (
        "warmup_steps",
        "warmup_steps = ratio x max_steps; the default is 2 % of max_steps",
        "warmup warmup_ratio warmup_proportion warmup_fraction num_warmup_steps",
    ),
    ("schedule", "cosine, linear, constant or wsd", "scheduler lr_scheduler lr_scheduler_type lr_schedule decay_lr"),
    ("decay_fraction", "of wsd, in shares of max_steps", "cooldown cooldown_frac cooldown_fraction decay_ratio"),
    ("ema", "its decay, such as 0.999", "ema_decay use_ema ema_beta ema_rate"),
    ("grad_clip", "", "clip clip_grad max_grad_norm max_norm grad_norm gradient_clip_val gradient_clipping"),
    ("optimizer", "adamw or muon", "optim optimizer_name optimizer_type"),
    ("muon_lr", "", "matrix_lr"),
    ("muon_momentum", "Muon's; AdamW has beta1", "momentum"),
    ("weight_decay", "", "wd"),
    ("beta1", "", "adam_beta1"),
    ("beta2", "", "adam_beta2"),
    (
        "out_dir",
        "",
        "out output_dir output_path output out_path save_dir save_path checkpoint_dir ckpt_dir run_dir logging_dir",
    ),
    ("preset", "a name or a TOML file", "config config_file config_path config_name conf recipe yaml"),
    (
        "text",
        "files, folders or a name; data_dir is for a folder of token files",
        "dataset dataset_name data data_path train_data train_file train_path input input_file corpus file",
    ),
    (
        "init_from",
        "a run folder or .pt file to start from; n_layer, n_head and n_embd give the shape of a new model",
        "model model_name model_name_or_path base_model pretrained pretrained_model finetune",
    ),
    (
        "teacher",
        "a finished run, or what init_from takes",
        "teacher_model teacher_model_path teacher_model_name_or_path teacher_path distill_from from_teacher_path",
    ),
    ("teacher_share", "0.8 if not given", "alpha distill_alpha distillation_alpha kd_alpha kd_ratio"),
    ("resume", "with out_dir, the run folder", "resume_from resume_from_checkpoint resume_path resume_training"),
    ("val_fraction", "", "val_split valid_fraction validation_split val_ratio test_size"),
    ("eval_every", "in steps", "eval_steps evaluation_steps eval_freq eval_iter val_every val_check_interval"),
    ("eval_tokens", "in tokens: eval_iters x batch_size x block_size", "eval_iters eval_batches max_eval_samples"),
    (
        "save_every",
        "in steps, or a duration such as 10m",
        "save_steps save_interval save_freq checkpoint_interval checkpoint_every ckpt_interval",
    ),
    ("keep", "", "save_total_limit keep_checkpoints max_checkpoints"),
    ("log_every", "in steps", "logging_steps log_steps log_freq logging_interval print_every"),
    ("patience", "in evaluations", "early_stopping early_stopping_patience"),
    ("max_time", "90, 10m or 2h", "time_limit max_runtime train_seconds"),
    (
        "track",
        "tensorboard or wandb; for an existing run: losscurve track RUN --to wandb",
        "wandb wandb_log wandb_project wandb_run_name use_wandb wandb_enabled report_to tensorboard logger",
    ),
    ("dtype", "auto, float32, bfloat16 or float16", "fp16 bf16 fp32 half amp precision mixed_precision torch_dtype"),
    ("device", "cpu, mps, cuda or cuda:N", "gpu gpus cuda no_cuda use_cpu use_cuda accelerator"),
    ("compile", "", "torch_compile use_compile"),
    ("parallel", "ddp or fsdp", "fsdp ddp strategy"),
    ("nproc", "", "nproc_per_node num_gpus n_gpu num_processes world_size devices"),
    ("activation_checkpointing", "", "gradient_checkpointing use_gradient_checkpointing grad_checkpointing"),
    ("seed", "", "random_seed manual_seed rng_seed"),
    # flags of sample
    ("prompt", "", "start text input"),
    ("max_new_tokens", "", "max_tokens n_predict length max_length num_tokens sample_len"),
    ("num_samples", "", "n samples num_return_sequences"),
    ("temperature", "", "temp"),
    ("top_k", "", "topk"),
    ("top_p", "", "topp"),
    (
        "checkpoint",
        "a .pt file; out_dir for a run folder",
        "model ckpt ckpt_path checkpoint_path model_path weights_path",
    ),
    # flags of export, report, compare and plot
    ("out", "", "out_dir output_dir out_path output_path output out_file output_file save_path"),
    # flags of prepare
    ("data_dir", "", "out_dir output_dir output out"),
)


def find_our_name(name: str, known: Container[str]) -> tuple[str, str] | None:
    """Return our name (one of `known`) for another program's `name`, and a note about it; None if there is none."""
    for own, note, theirs in NAMES:
        if own in known and name in theirs.split():
            return own, note
    return None
