"""Owns the training stages: what each trains on, and its defaults."""

from trainer.train_args import Stage

LLM = Stage(
    name="llm",
    title="LLM",
    data_kind="text",
    defaults={
        "epochs": 1,
        "batch_size": 32,
        "learning_rate": 5e-4,
        "max_seq_len": 512,
        "freeze_llm": 0,
        "from_weight": "none",
        "save_weight": "llm",
        "wandb_project": "MiniMind-V-LLM",
    },
)

PRETRAIN = Stage(
    name="pretrain",
    title="Pretrain",
    data_kind="pretrain",
    defaults={
        "epochs": 4,
        "batch_size": 16,
        "learning_rate": 4e-4,
        "max_seq_len": 640,
        "freeze_llm": 1,
        "from_weight": "llm",
        "save_weight": "pretrain_vlm",
        "wandb_project": "MiniMind-V-Pretrain",
    },
    third={"epochs": 2, "max_seq_len": 450, "freeze_llm": 2, "save_interval": 1000},
)

SFT = Stage(
    name="sft",
    title="SFT",
    data_kind="sft",
    defaults={
        "epochs": 2,
        "batch_size": 4,
        "learning_rate": 1e-6,
        "max_seq_len": 1536,
        "freeze_llm": 0,
        "from_weight": "pretrain_vlm",
        "save_weight": "sft_vlm",
        "wandb_project": "MiniMind-V-SFT",
    },
    third={"learning_rate": 5e-6, "max_seq_len": 768, "freeze_llm": 1, "save_interval": 1000},
)

SCST = Stage(
    name="scst",
    title="SCST",
    data_kind="sft",
    has_rewards=True,
    defaults={
        "epochs": 1,
        "batch_size": 16,
        "learning_rate": 1e-5,
        "max_seq_len": 768,
        "freeze_llm": 0,
        "from_weight": "sft_vlm",
        "save_weight": "scst_vlm",
        "wandb_project": "MiniMind-V-SCST",
    },
)

STAGES = {stage.name: stage for stage in (LLM, PRETRAIN, SFT, SCST)}
