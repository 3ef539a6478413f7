"""Fine-tunes a retrofit with PEFT: a LoRA of its linear layers and the depth attention in full, or the latter alone.

    attnres retrofit BASE my-attnres
    python examples/finetune_lora.py my-attnres my-adapter --files my-texts/*.txt
    python examples/finetune_lora.py my-attnres my-adapter --attnres-alone --learning-rate 3e-3

The adapter loads with `PeftModel.from_pretrained(model, "my-adapter")`, and `merge_and_unload()` merges it.
"""

import argparse

from continue_training import add_options, run
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from transformers import PreTrainedModel

from modeling_attnres import ATTN_RES_MODULES


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hub id of the retrofit")
    parser.add_argument("output", help="folder for the adapter")
    add_options(parser, learning_rate=2e-4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--attnres-alone", action="store_true", help="no LoRA: under 0.1 % of the parameters")
    options = parser.parse_args()

    def with_adapter(model: PreTrainedModel) -> PeftModel:
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=options.rank,
            lora_alpha=2 * options.rank,
            # PEFT's name for a LoRA of nothing, which leaves `modules_to_save`
            target_modules=DUMMY_TARGET_MODULES if options.attnres_alone else "all-linear",
            modules_to_save=ATTN_RES_MODULES,
        )
        model = get_peft_model(model, config)
        model.print_trainable_parameters()
        return model

    run(options, with_adapter)


if __name__ == "__main__":
    main()
