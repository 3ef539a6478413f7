"""`transformers serve` for AttnRes checkpoints. It has the options of the command, and `transformers chat` talks to it:

    python examples/serving/transformers_serve.py CHECKPOINT --port 8000
    transformers chat CHECKPOINT http://localhost:8000

The command takes the class that config.json names from transformers' own namespace, also with `--trust-remote-code`.
"""

import sys

import transformers
from transformers.cli.transformers import main

from modeling_attnres import AttnResForCausalLM


if __name__ == "__main__":
    # On the module's class, since reading a processor makes a second copy of the module
    type(transformers).AttnResForCausalLM = AttnResForCausalLM
    sys.argv.insert(1, "serve")
    main()
