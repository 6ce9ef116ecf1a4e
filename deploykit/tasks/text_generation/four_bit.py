"""QLoRA: train an adapter on top of 4-bit weights (Dettmers et al., NeurIPS 2023), with bitsandbytes on a GPU."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from deploykit.errors import UsageError
from deploykit.training import trainer


def check_four_bit() -> None:
    """Raise UsageError where bitsandbytes or a CUDA GPU is missing."""
    if not torch.cuda.is_available():
        raise UsageError(
            "--load-in-4bit needs an NVIDIA GPU, and PyTorch sees none",
            "leave it out: --lora-r alone trains an adapter on any machine",
        )
    if find_spec("bitsandbytes") is None:
        raise UsageError("--load-in-4bit needs bitsandbytes", "pip install 'deploykit[qlora]'")


def load_four_bit(source: str, **config: Any) -> Any:
    """Return the model of a checkpoint folder or hub id with linear layers in NF4, ready for an adapter.

    ``config`` overrides its configuration. The head and the embeddings keep their precision, and norms are fp32.
    """
    from peft import prepare_model_for_kbit_training

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft and transformers about each other's next release
        model = AutoModelForCausalLM.from_pretrained(
            source,
            quantization_config=four_bit_config(),
            dtype="auto",
            trust_remote_code=False,
            device_map={"": _device()},
            **config,
        )
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def four_bit_config() -> BitsAndBytesConfig:
    """Return the settings of the paper: NF4, scales quantized once more, products in bf16 where the GPU has it."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if trainer.computes_bf16() else torch.float16,
    )


def _device() -> torch.device:
    """Return the GPU of this process: with ``accelerate launch`` each has its own."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
