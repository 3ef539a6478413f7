"""
Continues the training of a retrofit on text or chats.

    attnres retrofit BASE my-attnres
    python examples/continue_training.py --model my-attnres --files texts/*.txt --output_dir trained --max_steps 1000
    python examples/continue_training.py --config training.yaml

Files are `.txt`, or `.jsonl` with the field `text`, `messages` (a chat, of which the last reply is trained), or
`prompt` and `completion`. All fields of TRL's `SFTConfig` are options, on the command line and in a YAML file
(`--config`).
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer, TrlParser

from modeling_attnres import attn_res_parameter_groups
from modeling_attnres.callback import DepthAttentionCallback


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder or Hub id of the model."})
    files: list[str] = field(metadata={"help": "Text files, or files of JSON lines."})
    attn_res_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of queries and key norms. Default: `learning_rate`."}
    )
    resume: bool = field(default=False, metadata={"help": "Resume from the last complete checkpoint in `output_dir`."})


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


def adamw(model: torch.nn.Module, **options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(attn_res_parameter_groups(model, **options))


def main():
    arguments, config = TrlParser((Arguments, SFTConfig)).parse_args_and_config()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    data = load_files(arguments.files)
    if "text" in data.column_names:
        config.packing, config.packing_strategy = True, "wrapped"
    options = {"learning_rate": config.learning_rate, "attn_res_learning_rate": arguments.attn_res_learning_rate}
    trainer = SFTTrainer(
        model,
        config,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        optimizer_cls_and_kwargs=(lambda: adamw, {**options, "weight_decay": config.weight_decay}),
    )
    trainer.add_callback(DepthAttentionCallback(trainer))
    # Trainer writes its state last, so a checkpoint without it is not complete
    complete = [state.parent for state in Path(config.output_dir).glob("checkpoint-*/trainer_state.json")]
    last = max(complete, key=lambda folder: int(folder.name.split("-")[1]), default=None)
    trainer.train(resume_from_checkpoint=last if arguments.resume else None)
    trainer.save_model()


if __name__ == "__main__":
    main()
