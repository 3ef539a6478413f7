"""
Fine-tunes a retrofit with PEFT: a LoRA on the linear layers, and the depth attention in full.

    attnres retrofit BASE my-attnres
    python examples/finetune_lora.py --model my-attnres --files chats.jsonl --output_dir my-adapter
    python examples/finetune_lora.py --model my-attnres --files chats.jsonl --output_dir my-adapter --attn_res_only true

Files are `.txt`, or `.jsonl` with the field `text`, `messages` (a chat, of which the last reply is trained), or
`prompt` and `completion`. All fields of TRL's `SFTConfig` are options, on the command line and in a YAML file
(`--config`).
`PeftModel.from_pretrained(model, "my-adapter")` loads the adapter, and `merge_and_unload()` merges it.
"""

from dataclasses import dataclass, field

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer, TrlParser

from modeling_attnres import ATTN_RES_MODULES, with_base_targets


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder or Hub id of the model."})
    files: list[str] = field(metadata={"help": "Text files, or files of JSON lines."})
    rank: int = field(default=8, metadata={"help": "Rank of the LoRA."})
    attn_res_only: bool = field(default=False, metadata={"help": "Train the depth attention without a LoRA."})


def load_files(files: list[str]) -> Dataset:
    is_json = files[0].endswith((".json", ".jsonl"))
    options = {} if is_json else {"sample_by": "document"}
    data = load_dataset("json" if is_json else "text", data_files=files, split="train", **options)
    columns = set(data.column_names)
    if "messages" in columns:
        # The chat template formats both, and only the completion has a loss
        split = lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}  # noqa: E731
        return data.map(split, remove_columns=data.column_names)
    if "text" not in columns and not {"prompt", "completion"} <= columns:
        raise ValueError(
            f"`files` have the fields {sorted(columns)}. Supported: `text`, `messages`, or `prompt` and `completion`."
        )
    return data


def main():
    arguments, config = TrlParser((Arguments, SFTConfig)).parse_args_and_config()
    data = load_files(arguments.files)
    if "text" in data.column_names:
        config.packing, config.packing_strategy = True, "wrapped"
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        # PEFT's name for no LoRA at all
        target_modules=DUMMY_TARGET_MODULES if arguments.attn_res_only else "all-linear",
        modules_to_save=ATTN_RES_MODULES,
    )
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    trainer = SFTTrainer(
        model,
        config,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        # The experts of a mixture, too
        peft_config=lora if arguments.attn_res_only else with_base_targets(model, lora),
    )
    trainer.model.print_trainable_parameters()
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
