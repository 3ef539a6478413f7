"""
Fine-tunes a retrofit with PEFT: a LoRA on the linear layers, and the depth attention in full.

    attnres retrofit BASE my-attnres
    python examples/finetune_lora.py --model my-attnres --data chats.jsonl --output_dir my-adapter
    python examples/finetune_lora.py --model my-attnres --data chats.jsonl --output_dir my-adapter --attn_res_only true

The data are `.txt` files, `.jsonl` files or a dataset of the Hub, with the field `text`, `messages` (a chat; only the
replies have a loss), or `prompt` and `completion`. All fields of TRL's `SFTConfig` are options, on the command line
and in a YAML file (`--config`).
`PeftModel.from_pretrained(model, "my-adapter")` loads the adapter, and `merge_and_unload()` merges it.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig, SFTTrainer, TrlParser

from modeling_attnres import ATTN_RES_MODULES, with_base_targets


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder or Hub id of the model."})
    data: list[str] = field(metadata={"help": "Text files, files of JSON lines, or one dataset of the Hub."})
    rank: int = field(default=8, metadata={"help": "Rank of the LoRA."})
    attn_res_only: bool = field(default=False, metadata={"help": "Train the depth attention without a LoRA."})


def load_data(names: list[str]) -> Dataset:
    suffixes = {Path(name).suffix for name in names}
    if suffixes == {".txt"}:
        return load_dataset("text", data_files=names, sample_by="document", split="train")
    if suffixes == {".jsonl"}:
        data = load_dataset("json", data_files=names, split="train")
    elif len(names) == 1 and not Path(names[0]).is_file():
        data = load_dataset(names[0], split="train")
    else:
        raise ValueError(f"{names}: give only `.txt` files, only `.jsonl` files, or one dataset.")
    columns = set(data.column_names)
    if "messages" in columns:
        # The chat template formats both, and only the completion has a loss
        data = data.map(replies, batched=True, remove_columns=data.column_names)
        if not len(data):
            raise ValueError(f"{names}: the chats have no message of the `assistant` that follows another message.")
    elif "text" not in columns and not {"prompt", "completion"} <= columns:
        raise ValueError(
            f"{names}: the fields are {sorted(columns)}. Supported: `text`, `messages`, or `prompt` and `completion`."
        )
    return data


def replies(rows: dict[str, list]) -> dict[str, list]:
    chats = rows["messages"]
    ends = [(chat, end) for chat in chats for end in range(1, len(chat)) if chat[end]["role"] == "assistant"]
    return {"prompt": [chat[:end] for chat, end in ends], "completion": [[chat[end]] for chat, end in ends]}


def main():
    parser = TrlParser((Arguments, SFTConfig))
    parser.set_defaults(bf16=is_torch_bf16_gpu_available())
    arguments, config = parser.parse_args_and_config()
    data = load_data(arguments.data)
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
        # Includes the experts of a mixture
        peft_config=with_base_targets(model, lora),
    )
    if trainer.is_world_process_zero():
        trainer.model.print_trainable_parameters()
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
