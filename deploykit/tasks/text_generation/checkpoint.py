"""Language model checkpoints in PyTorch: load them, also from GGUF, and answer with them."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig

from deploykit.errors import ArtifactError, MissingDependencyError, UsageError
from deploykit.graphs.causal_architecture import check_supported
from deploykit.runtime.sampling import Sampling
from deploykit.tasks.text_generation.chat_template import CHATML, CHATML_TOKENS
from deploykit.tasks.text_generation.encode import ChatTokenizer, EncodedRow
from deploykit.tasks.text_generation.facts import TextGeneration
from deploykit.tasks.text_generation.generator import LocalGenerator, RowScore
from deploykit.tasks.text_generation.rows import Row
from deploykit.training.checkpoint import load_config, load_model, load_tokenizer, not_loadable, quiet
from deploykit.training.generation_fields import refuse_unknown
from deploykit.training.weights import read_generation_config

_PROBE = Row(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))
# The lengths are a caller's to choose; the others mean nothing to a language model, or without beams.
_DECODED_BY = frozenset((
    "repetition_penalty", "eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id", "max_length",
    "max_new_tokens", "early_stopping", "length_penalty", "renormalize_logits",
))  # fmt: skip


_LAST_LINE_END = re.compile(r"(\r\n|\r|\n)\Z")
_ROWS = 128
_SCORED_TOKENS = 2048
"""Maximum padded tokens of rows that are scored in one batch, unless one row has more."""


class TorchCausalLm:
    """``CausalLm`` in PyTorch. Rows are padded on the left to the longest."""

    rows = 0
    max_rows = _ROWS
    max_tokens = 1 << 62  # not limited
    prefix_tokens = 2048

    def __init__(self, model: Any) -> None:
        self.model = model
        self._lengths = np.zeros(0, np.int64)
        self._batch = DynamicCache()
        self.begin()

    def begin(self) -> None:
        self._prompt, self._read = DynamicCache(), 0

    def feed(self, ids: Sequence[int], wanted: Sequence[int]) -> NDArray[np.float32]:
        positions = torch.arange(self._read, self._read + len(ids))[None]
        self._read += len(ids)
        mask = torch.ones(1, self._read, dtype=torch.int64)
        logits = self._run(torch.tensor([list(ids)]), mask, positions, self._prompt, torch.tensor(wanted or [0]))
        found: NDArray[np.float32] = logits[0, : len(wanted)]
        return found

    def saved(self, start: int, end: int) -> Any:
        return [(layer.keys[:, :, start:end], layer.values[:, :, start:end]) for layer in self._prompt.layers]

    def restore(self, block: Any) -> None:
        for i, (keys, values) in enumerate(block):
            self._prompt.update(keys, values, i)
        self._read += block[0][0].shape[2]

    def admit(self, reserved: int) -> None:
        if not self.rows:
            self._batch = DynamicCache()
        longest = max(int(self._lengths.max(initial=0)), self._read)
        for i, layer in enumerate(self._prompt.layers):
            old = self._batch.layers[i] if self.rows else None
            for name in ("keys", "values"):
                rows = [_padded(getattr(layer, name), longest)]
                if old is not None:
                    setattr(old, name, torch.cat([_padded(getattr(old, name), longest), *rows]))
                else:
                    setattr(layer, name, rows[0])
            if old is None:
                self._batch.update(layer.keys, layer.values, i)
        self._lengths = np.append(self._lengths, self._read)
        self.rows += 1

    def step(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        positions = torch.from_numpy(self._lengths)[:, None]
        self._lengths = self._lengths + 1
        longest = int(self._lengths.max())
        mask = (torch.arange(longest) >= longest - positions - 1).long()
        logits: NDArray[np.float32] = self._run(torch.from_numpy(tokens)[:, None], mask, positions, self._batch, 1)
        return logits[:, 0]

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def copy(self, sources: Sequence[int], targets: Sequence[int], begin: int) -> None:
        for layer in self._batch.layers:
            layer.keys[list(targets)] = layer.keys[list(sources)]
            layer.values[list(targets)] = layer.values[list(sources)]

    def remove(self, gone: NDArray[np.int64]) -> NDArray[np.int64]:
        order = np.delete(np.arange(self.rows), gone)
        self._lengths, self.rows = self._lengths[order], len(order)
        if self.rows:
            longest = int(self._lengths.max())
            for layer in self._batch.layers:
                layer.keys, layer.values = (
                    x[torch.from_numpy(order), :, -longest:] for x in (layer.keys, layer.values)
                )
        return order

    def supervised_logits(self, rows: Sequence[EncodedRow], pad: int) -> Iterator[NDArray[np.float32]]:
        """Return the logits that predict supervised tokens of rows that are computed in one batch: [supervised,
        vocabulary] for each row."""
        longest = max(len(row.ids) for row in rows)
        ids, mask = np.full((len(rows), longest), pad, np.int64), np.zeros((len(rows), longest), np.int64)
        wanted = np.zeros((len(rows), longest), np.bool_)
        for i, row in enumerate(rows):
            own = slice(longest - len(row.ids), None)
            ids[i, own], mask[i, own] = row.ids, 1
            wanted[i, longest - len(row.ids) : -1] = row.supervised[1:]  # a logit predicts the token after its own
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        kept = np.flatnonzero(wanted.any(0))
        logits = self._run(*map(torch.from_numpy, (ids, mask, positions)), None, torch.from_numpy(kept))
        yield from (values[own] for values, own in zip(logits, wanted[:, kept]))

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _run(self, ids: Any, mask: Any, positions: Any, cache: Any, kept: Any) -> NDArray[np.float32]:
        ids, mask, positions = (x.to(self.model.device) for x in (ids, mask, positions))  # a GPU while it trains on one
        outputs = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=cache is not None,
            logits_to_keep=kept,
        )  # fmt: skip
        logits: NDArray[np.float32] = outputs.logits.float().cpu().numpy()
        return logits


def _padded(cache: Any, length: int) -> Any:
    """Pad [rows, heads, positions, size] with zeros on the left to ``length`` positions."""
    return torch.nn.functional.pad(cache, (0, 0, length - cache.shape[2], 0))


class TorchGenerator(LocalGenerator):
    """A checkpoint that answers."""

    model: TorchCausalLm

    def __init__(self, model: Any, hf_tokenizer: Any, task: TextGeneration) -> None:
        super().__init__(task, chat_tokenizer(hf_tokenizer, task.eos_token_ids), TorchCausalLm(model.eval()))
        self.torch_model, self.hf_tokenizer = model, hf_tokenizer

    def score(self, rows: Sequence[EncodedRow]) -> Iterator[RowScore]:
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS]
            # Batch rows of similar length: padding took half of the time.
            order = sorted(range(len(part)), key=lambda i: len(part[i].ids))
            found = dict(zip(order, super().score([part[i] for i in order])))
            yield from (found[i] for i in range(len(part)))

    def supervised_logits(self, rows: Sequence[EncodedRow]) -> Iterator[NDArray[np.float32]]:
        for part in _side_by_side(rows):
            yield from self.model.supervised_logits(part, self.task.pad_token_id)

    @classmethod
    def load(cls, path: Path, rotary: Any = None) -> TorchGenerator:
        """Load a checkpoint of deploykit's or anyone's. Raises ArtifactError or ExportError for one that is unusable.

        ``rotary``: the rotary embedding of a GGUF file's model, which knows its RoPE scaling.
        """
        quiet()
        if rotary is None:
            check_rope(str(path))
        tokenizer = load_base_tokenizer(str(path))
        model = load_base(str(path))
        if rotary is not None:
            model.model.rotary_emb = rotary
        return cls(model, tokenizer, checkpoint_facts(model.config, model.generation_config, tokenizer))


def _side_by_side(rows: Sequence[EncodedRow]) -> Iterator[list[EncodedRow]]:
    """Yield consecutive rows that fit ``_SCORED_TOKENS``."""
    part: list[EncodedRow] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row.ids))
        if part and (len(part) + 1) * longest > _SCORED_TOKENS:
            yield part
            part, longest = [], len(row.ids)
        part.append(row)
    if part:
        yield part


def load_base(source: str, **config: Any) -> Any:
    """Return the model of a checkpoint folder, hub id or GGUF file, in fp32 and eval mode; ``config`` overrides its configuration."""
    if not source.endswith(".gguf"):
        return load_model(source, TextGeneration.name, **config)
    with _reading_gguf(source) as (folder, file):
        read = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, dtype=torch.float32, trust_remote_code=False, attn_implementation="eager"
        )
    # The weights are plain fp32 by now, but the configuration still says GGUF, and then nothing can be saved.
    settings = {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    model = type(read)._from_config(
        type(read.config)(**{**settings, **config}), attn_implementation="eager", dtype=torch.float32
    )
    missing, unexpected = model.load_state_dict(read.state_dict(), strict=False)
    if unexpected or any("rotary" not in name and "lm_head" not in name for name in missing):
        raise ArtifactError(f"{source}: weights are missing or unknown: {[*missing, *unexpected][:3]}", "copy it again")
    model.tie_weights()
    return model.eval()


def load_base_tokenizer(source: str) -> Any:
    """Return the fast tokenizer of a checkpoint folder, hub id or GGUF file."""
    if not source.endswith(".gguf"):
        tokenizer = load_tokenizer(source)
        if isinstance(tokenizer.chat_template, dict):
            tokenizer.chat_template = _one_template(tokenizer.chat_template, source)
        return tokenizer
    with _reading_gguf(source) as (folder, file):
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, trust_remote_code=False)
        cut = _read_gguf(str(Path(folder) / file)).get_field("tokenizer.ggml.pre")
        if cut is not None and cut.contents() == "smollm":
            # transformers cuts all byte-level BPE as GPT-2 does; SmolLM cuts digits apart first.
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        return tokenizer


def _one_template(named: Mapping[str, str], source: str) -> str:
    """Return one template that does what ``apply_chat_template`` does with several: ``tool_use`` writes dialogs with
    tools, ``default`` all others. Raises ArtifactError if there is no ``default``."""
    if "default" not in named:
        raise ArtifactError(
            f"{source}: its tokenizer has the chat templates {', '.join(named)}, and none is named default",
            "name one of them default in tokenizer_config.json",
        )
    if "tool_use" not in named:
        return named["default"]
    # Jinja drops the line end after a tag, the white space before a tag that begins its line, and the last line end of a template.
    # So each template begins on a new line, and an expression stands between its end and the next tag.
    tools, plain = ("\n" + _LAST_LINE_END.sub("", named[name]) + "{{ '' }}" for name in ("tool_use", "default"))
    return f"{{% if tools %}}{tools}{{% else %}}{plain}{{% endif %}}"


def load_base_config(source: str) -> tuple[Any, Any]:
    """Return model and generation configuration. Raises ExportError for an architecture that cannot be exported."""
    if source.endswith(".gguf"):
        check_rope(source)
        with _reading_gguf(source) as (folder, file):
            config = AutoConfig.from_pretrained(folder, gguf_file=file, trust_remote_code=False)
    else:
        config = load_config(source)
    check_supported(config, source)
    if source.endswith(".gguf"):
        return config, GenerationConfig.from_model_config(config)
    return config, read_generation_config(source)


def check_rope(source: str) -> None:
    """Raise ArtifactError for a GGUF file with RoPE scaling: transformers would leave the scaling out."""
    if not source.endswith(".gguf"):
        return
    with _reading_gguf(source) as (folder, file):
        reader = _read_gguf(str(Path(folder) / file))
        kinds = {f.contents() for name, f in reader.fields.items() if name.endswith(".rope.scaling.type")}
        scaled = bool(kinds - {"none"}) or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors)
    if scaled:
        raise ArtifactError(
            f"{source}: its model has RoPE scaling, which is not read from GGUF files",
            "give the folder of the Hugging Face checkpoint",
        )


@contextlib.contextmanager
def _reading_gguf(source: str) -> Any:
    """Yield folder and file name, as transformers wants them."""
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError(f"{source}: GGUF files need gguf", "pip install 'deploykit[finetune]'") from error
    path = Path(source)
    plain = gguf.GGUFReader
    try:
        # transformers reads the file anew for the configuration, the tokenizer and the weights.
        gguf.GGUFReader = _read_gguf
        # It draws progress bars, and warns that weights become fp32.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield str(path.parent), path.name
    except Exception as error:  # transformers raises whatever its loaders raise
        raise not_loadable(source, error) from error
    finally:
        gguf.GGUFReader = plain


@cache
def _read_gguf(path: str) -> Any:
    from gguf import gguf_reader

    class Reader(gguf_reader.GGUFReader):  # type: ignore[misc]
        """Reads from a plain array: most of the time went into a new memmap for each of a hundred thousand strings."""

        @property
        def data(self) -> NDArray[np.uint8]:
            return self._plain

        @data.setter
        def data(self, mapped: NDArray[np.uint8]) -> None:
            self._plain = mapped.view(np.ndarray)

    return Reader(path)


def chat_tokenizer(tokenizer: Any, eos_token_ids: Sequence[int]) -> ChatTokenizer:
    """Return an encoder that works as Hugging Face's ``tokenizer`` does, without transformers."""
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    return ChatTokenizer(copy, tokenizer.chat_template, special_tokens(tokenizer), eos_token_ids)


def special_tokens(tokenizer: Any) -> dict[str, str]:
    """Return the tokens that a chat template may name."""
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}


def checkpoint_facts(config: Any, generation: Any, tokenizer: Any, columns: Sequence[str] = ()) -> TextGeneration:
    """Return the facts of a checkpoint. Its answers end with each end token that its configuration, its tokenizer or its
    chat template writes, and they are decoded by its ``repetition_penalty``.

    Raises ArtifactError if its generation configuration has a field that decoding does not support, apart from sampling.
    """
    refuse_unknown(generation, config.name_or_path or "the checkpoint", _DECODED_BY)
    ids = [generation.eos_token_id, config.eos_token_id, tokenizer.eos_token_id]
    eos = [int(i) for found in ids for i in (found if isinstance(found, list) else [found]) if i is not None]
    if tokenizer.chat_template is not None:
        eos += end_of_turn(chat_tokenizer(tokenizer, eos))
    if not eos:
        raise UsageError("the checkpoint has no token that ends a text", "give --chat-template, or set its eos_token")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
    positions = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    return TextGeneration(
        family=str(config.model_type),
        vocabulary=int(config.vocab_size),
        max_length=int(min(positions, 1_000_000)),
        pad_token_id=int(pad),
        eos_token_ids=tuple(dict.fromkeys(eos)),
        special_tokens=special_tokens(tokenizer),
        sampling=Sampling(repetition_penalty=float(generation.repetition_penalty or 1)),
        columns=tuple(columns),
        chat=tokenizer.chat_template is not None,
    )


def end_of_turn(tokenizer: ChatTokenizer) -> list[int]:
    """Return the token that the chat template ends an answer with, if it is a special one."""
    row = tokenizer.encode_row(_PROBE)
    supervised = row.ids[row.supervised]
    return [int(supervised[-1])] if len(supervised) and int(supervised[-1]) in tokenizer.special_ids else []


def set_template(tokenizer: Any, template: str | None, eos_token_ids: Sequence[int], *, needed: bool) -> list[str]:
    """Give a Hugging Face tokenizer the chat template ``template``, None: its own; return the tokens that were added.

    Raises UsageError if one is ``needed`` and missing, or if its answers have no end that a model could
    write.
    """
    added: list[str] = []
    if template is not None:
        tokenizer.chat_template = template
        if template == CHATML:
            added = [token for token in CHATML_TOKENS if token not in tokenizer.get_vocab()]
            if added:
                tokenizer.add_special_tokens({"additional_special_tokens": list(CHATML_TOKENS)})
    if tokenizer.chat_template is None:
        if needed:
            raise UsageError(
                "the checkpoint has no chat template, and dialogs need one",
                "give --chat-template chatml or alpaca, or a Jinja file",
            )
        return added
    if needed and not end_of_turn(chat_tokenizer(tokenizer, eos_token_ids)):
        raise UsageError(
            "the chat template ends an answer with no special token, so the model could not learn to stop",
            "let it end an answer with {{ eos_token }}",
        )
    return added
