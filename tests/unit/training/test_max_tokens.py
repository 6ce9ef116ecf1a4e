"""The longest text that a checkpoint takes is as long as its model can read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from deploykit.training.checkpoint import max_tokens

NO_LIMIT = SimpleNamespace(model_max_length=10**30)
SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize(
    "family", ["bert", "camembert", "data2vec-text", "esm", "ibert", "luke", "mpnet", "xlm-roberta"]
)
def test_a_text_of_that_length_runs_and_a_longer_one_does_not(family: str, pad: int) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    more = {"entity_vocab_size": 4} if family == "luke" else {}
    config = AutoConfig.for_model(family, max_position_embeddings=24, pad_token_id=pad, **SMALL, **more)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    longest = max_tokens(NO_LIMIT, config)
    with torch.inference_mode():
        model(input_ids=torch.full((1, longest), 7))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, longest + 1), 7))


def test_other_names_and_no_limit() -> None:
    from transformers import AutoConfig

    assert max_tokens(NO_LIMIT, AutoConfig.for_model("mpt", max_seq_len=40)) == 40
    assert max_tokens(NO_LIMIT, AutoConfig.for_model("modernbert")) == 8192
    assert max_tokens(NO_LIMIT, AutoConfig.for_model("xlnet")) == 512
    assert max_tokens(SimpleNamespace(model_max_length=30), AutoConfig.for_model("xlnet")) == 30
