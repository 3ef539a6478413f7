"""
Continues the training of a retrofit on text or chats.

    attnres retrofit BASE my-attnres
    python examples/continue_training.py --model my-attnres --data texts/*.txt --output_dir trained --max_steps 1000
    python examples/continue_training.py --config training.yaml

The data are `.txt` files, `.jsonl` files or a dataset of the Hub, with the field `text`, `messages` (a chat; only the
replies have a loss), or `prompt` and `completion`. All fields of TRL's `SFTConfig` are options, on the command line
and in a YAML file (`--config`).
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig, SFTTrainer, TrlParser

from modeling_attnres import attn_res_parameter_groups
from modeling_attnres.callback import DepthAttentionCallback


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder or Hub id of the model."})
    data: list[str] = field(metadata={"help": "Text files, files of JSON lines, or one dataset of the Hub."})
    eval_data: list[str] | None = field(default=None, metadata={"help": "The same for evaluation."})
    attn_res_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of queries and key norms, with AdamW. Default: `learning_rate`."}
    )
    resume: bool = field(default=False, metadata={"help": "Resume from the last complete checkpoint in `output_dir`."})


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


def adamw(model: torch.nn.Module, **options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(attn_res_parameter_groups(model, **options))


def main():
    parser = TrlParser((Arguments, SFTConfig))
    parser.set_defaults(bf16=is_torch_bf16_gpu_available())
    arguments, config = parser.parse_args_and_config()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    data = load_data(arguments.data)
    if "text" in data.column_names:
        config.packing, config.packing_strategy = True, "wrapped"
    optimizer = None
    if arguments.attn_res_learning_rate is not None:
        rates = {"learning_rate": config.learning_rate, "attn_res_learning_rate": arguments.attn_res_learning_rate}
        optimizer = (lambda: adamw, {**rates, "weight_decay": config.weight_decay})
    trainer = SFTTrainer(
        model,
        config,
        train_dataset=data,
        eval_dataset=load_data(arguments.eval_data) if arguments.eval_data else None,
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        optimizer_cls_and_kwargs=optimizer,
    )
    trainer.add_callback(DepthAttentionCallback(trainer))
    # Trainer writes its state last, so a checkpoint without it is not complete
    complete = [state.parent for state in Path(config.output_dir).glob("checkpoint-*/trainer_state.json")]
    last = max(complete, key=lambda folder: int(folder.name.split("-")[1]), default=None)
    trainer.train(resume_from_checkpoint=last if arguments.resume else None)
    trainer.save_model()


if __name__ == "__main__":
    main()
