"""Training with the tools of others, next to the base."""

import pytest
import torch
from conftest import attnres_of, tiny_base
from transformers import Trainer, TrainingArguments


@pytest.mark.parametrize("label_smoothing_factor", [0.0, 0.1])
def test_trainer_computes_the_base_s_loss(label_smoothing_factor, tmp_path):
    """Smoothing labels is Trainer's own work, which shifts them for the models it knows."""
    rows = torch.randint(1, 99, (8, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]
    args = TrainingArguments(
        tmp_path, label_smoothing_factor=label_smoothing_factor, report_to="none", use_cpu=True, disable_tqdm=True
    )
    base = tiny_base("llama")
    base_loss, loss = (
        Trainer(model, args, eval_dataset=data).evaluate()["eval_loss"] for model in (base, attnres_of(base))
    )
    assert loss == pytest.approx(base_loss, abs=1e-5)
