"""Lets a model answer a prompt, word by word.

python examples/generate.py my-attnres "What is the capital of France?"
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

import modeling_attnres  # noqa: F401  registers AttnRes with the Auto classes


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 40,
    show: bool = True,
    **kwargs,
) -> str:
    """The model's answer if it has a chat template, else its continuation of the prompt."""
    if tokenizer.chat_template is not None:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if show else None
    with torch.no_grad():
        tokens = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, streamer=streamer, **kwargs)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hub id")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--sample", action="store_true", help="sample in place of the likeliest token")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    generate(model, tokenizer, args.prompt, args.max_new_tokens, do_sample=args.sample)


if __name__ == "__main__":
    main()
