"""The serving tokenizers match Hugging Face's on real and hostile text."""

from __future__ import annotations

import functools
import gettext
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploykit.errors import ArtifactError, ExportError, UsageError
from deploykit.tasks.translation.plain_text import token_ids
from deploykit.tasks.translation.sentences import fit
from deploykit.tasks.translation.source_prefix import prefixed
from deploykit.tasks.translation.tokenizer import TranslationTokenizer, load_translation_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")

SAMPLES = """
All human beings are born free and equal in dignity and rights. They're endowed with reason, aren't they?
Tous les êtres humains naissent libres et égaux en dignité et en droits. L'œuvre coûte 3,50 € !
Alle Menschen sind frei und gleich an Würde und Rechten geboren. Straße, Fußgängerübergänge, 5 km².
Todos los seres humanos nacen libres e iguales en dignidad y derechos. ¿Qué? ¡Sí, señor!
Все люди рождаются свободными и равными в своём достоинстве и правах.
Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.
人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心。
すべての人間は、生まれながらにして自由であり、ｶﾀｶﾅも「尊厳」もある。
모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.
يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق. لماذا؟
כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.
सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।
มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ
Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm.
ሰብዓዊ ፍጡር ሁሉ ሲወለድ ነጻ ነው። Բոլոր մարդիկ ծնվում են ազատ։
""".strip().splitlines()

HOSTILE = (
    "", " ", "   ", "\t", "\n", "\r\n", "\u3000", "\u00a0", "\u200b", "\u200d", "\ufeff", "\x00", "a\x00b", "\x00" * 50,
    "\x01\x02\x1b[0m\x7f\x80\x9f", "a\tb\nc\rd", "  a  ", "a" * 20_000, "\u6211" * 5_000, "🎉" * 2_000, " " * 20_000,
    "▁", "▁▁", "▁a▁ b", " ▁", "</s>", "<s>", "<pad>", "<unk>", "<mask>", "</s></s>", "a</s>b", " </s> ", "<pad>x<unk>y</s>",
    "< /s>", "</S>", "<</s>>", ">>fr<<", ">>fra<< hello", ">>fra<<hello", " >>fra<< hello", ">>deu<<>>fra<< x", ">><<", ">>a",
    "<<a>>", ">>x\ny<< z", "a >>fra<< b", "</s>>>fra<< b", "__fr__", "__fr__ x", "x__fr__y", "___fr__", "__fr____en__", "__xx__",
    "fra_Latn", "a fra_Latn b", "xfra_Latny", "eng_Latn fra_Latn", "<extra_id_0>", "<extra_id_99> a <extra_id_1>0",
    "👩‍👩‍👧‍👦", "🏳️‍🌈 🇫🇷🇩🇪", "👍🏽", "❤️", "e\u0301 é", "a" + "\u0301" * 500, "Z͑ͫ̓ͪ̂ͫ̽͏", "\u202eabc\u202c", "شكرًا\u200f!", "क्षि",
    "ﬁ ﬀ ﬃ", "① ② ½ ² ³", "ＦＵＬＬ　ｗｉｄｔｈ", "Å Å Å", "㍿ ㌀ ㎏", "ĳ ŉ ǆ", "Ⅷ ℃ ℡ ™", "ſt ẛ̣", "\ufdfa", "ﷺ ﷽", "İi̇ ıI",
    "\ud800", "a\udfffb", "\ud83d\ude00", "\ue000\uf8ff", "\U0010ffff\ufffe\uffff", "\ufffd", "⁇", " ⁇ ", "''\"\"``", "don't . , ! ?",
    "it 's we 've I 'm n't", "http://x.y/z?a=b&c=%20#d", "{name} %s %(n)d <b>x</b> &amp;", "1,234.56e-7", "—–-‐‑", "…...", "$100 €5",
)  # fmt: skip
FRAGMENTS = [
    *(h for h in HOSTILE if len(h) < 60),
    *"aé我🎉 .▁\u0301\u200d\x00_<>/",
    *SAMPLES[0].split(),
    *SAMPLES[6:10],
]


@functools.cache
def real_lines(count: int) -> list[str]:
    """Return lines of the standard library and, if the machine has some, of gettext catalogs."""
    found: list[str] = []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        found += [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    for path in sorted(Path("/usr/share/locale").glob("*/LC_MESSAGES/*.mo"))[::40]:
        try:
            catalog = gettext.GNUTranslations(io.BytesIO(path.read_bytes()))
        except (OSError, UnicodeDecodeError, ValueError):
            continue
        found += [text for text in catalog._catalog.values() if text][:200]  # type: ignore[attr-defined]
    return random.Random(0).sample(found, min(count, len(found)))


def hostile_mixtures(count: int) -> list[str]:
    choice = random.Random(1)
    return ["".join(choice.choices(FRAGMENTS, k=choice.randint(1, 7))) for _ in range(count)]


@pytest.fixture(scope="module")
def strings() -> list[str]:
    texts = [*real_lines(9_000), *SAMPLES, *HOSTILE, *hostile_mixtures(3_000)]
    assert len(texts) >= 10_000
    return texts


@dataclass(frozen=True)
class Case:
    """A checkpoint whose tokenizer was saved and loaded again; ``prefix`` is added before Hugging Face's tokenizer."""

    reference: Any
    saved: TranslationTokenizer
    checkpoint: Path
    folder: Path
    prefix: str = ""

    def expected(self, texts: Sequence[str]) -> list[list[int]]:
        clean = [re.sub("[\ud800-\udfff]", "\ufffd", text) for text in texts]
        codes = {"deu", "fra"} if self.prefix.startswith(">>") else set()
        return token_ids(self.reference, [prefixed(text, self.prefix, codes) for text in clean])


def spm(lines: Sequence[str], size: int, **options: Any) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=size, hard_vocab_limit=False,
        minloglevel=2, num_threads=1, **options,
    )  # fmt: skip
    return model.getvalue()


def pieces(*models: bytes) -> list[str]:
    """Return the pieces of all models in order, each once, without control symbols."""
    import sentencepiece

    processors = [sentencepiece.SentencePieceProcessor(model_proto=model) for model in models]
    return list(dict.fromkeys(p.id_to_piece(i) for p in processors for i in range(3, p.get_piece_size())))


def vocabulary(*tokens: str) -> str:
    return json.dumps({token: i for i, token in enumerate(dict.fromkeys(tokens))})


@pytest.fixture(scope="module")
def models() -> tuple[bytes, bytes]:
    """A source model trained on English, and a target model trained on many languages."""
    english = real_lines(9_000)[:600]
    return spm(english, 500), spm([*SAMPLES * 4, *english[:100]], 900, character_coverage=0.98)


def write_marian(
    folder: Path, models: tuple[bytes, bytes], *, codes: Sequence[str] = (), separate: bool = False
) -> Any:
    from transformers import MarianTokenizer

    folder.mkdir()
    for name, model in zip(("source.spm", "target.spm"), models):
        (folder / name).write_bytes(model)
    (folder / "config.json").write_text('{"model_type": "marian"}')
    source, target = pieces(models[0]), pieces(models[1])
    if separate:
        (folder / "vocab.json").write_text(vocabulary("</s>", "<unk>", *source, "<pad>"))
        (folder / "target_vocab.json").write_text(vocabulary("<unk>", "</s>", *target, "<pad>"))
    else:
        (folder / "vocab.json").write_text(vocabulary("</s>", "<unk>", *source, *target, *codes, "<pad>"))
    MarianTokenizer(
        str(folder / "source.spm"), str(folder / "target.spm"), str(folder / "vocab.json"),
        str(folder / "target_vocab.json") if separate else None, separate_vocabs=separate,
    ).save_pretrained(folder)  # fmt: skip
    return MarianTokenizer.from_pretrained(folder)


def write_m2m100(folder: Path, model: bytes, **options: Any) -> Any:
    from transformers import M2M100Tokenizer

    folder.mkdir()
    (folder / "sentencepiece.bpe.model").write_bytes(model)
    (folder / "vocab.json").write_text(vocabulary("<s>", "<pad>", "</s>", "<unk>", *pieces(model)))
    files = str(folder / "vocab.json"), str(folder / "sentencepiece.bpe.model")
    M2M100Tokenizer(*files, **options).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "m2m_100"}')
    return M2M100Tokenizer.from_pretrained(folder, src_lang="en")


# transformers cannot read a SentencePiece file for these two if protobuf is older than sentencepiece's generated code,
# so they are made from a vocabulary, like a tokenizer.json.
def write_nllb(folder: Path, **options: Any) -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers, trainers
    from transformers import NllbTokenizer

    trained = Backend(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Precompiled(charsmap())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    trained.train_from_iterator([*SAMPLES, *real_lines(9_000)[:300]], trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    NllbTokenizer(model["vocab"], merges, _spm_precompiled_charsmap=charsmap(), **options).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "m2m_100"}')
    return NllbTokenizer.from_pretrained(folder, src_lang="eng_Latn")


def write_t5(folder: Path, model: bytes, **options: Any) -> Any:
    import sentencepiece
    from transformers import T5Tokenizer

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    scored = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(3, processor.get_piece_size())]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    T5Tokenizer([*special, *scored, *sentinels], _spm_precompiled_charsmap=charsmap(), **options).save_pretrained(
        folder
    )
    tasks = {
        f"translation_en_to_{code}": {"prefix": f"translate English to {name}: "}
        for code, name in (("de", "German"), ("fr", "French"))
    }
    config = {"model_type": "t5", "task_specific_params": {"summarization": {"prefix": "summarize: "}, **tasks}}
    (folder / "config.json").write_text(json.dumps(config))
    return T5Tokenizer.from_pretrained(folder)


def charsmap() -> bytes:
    """SentencePiece's NFKC table: field 2 of its NormalizerSpec."""
    import sentencepiece

    spec = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc").serialized_normalizer_spec()
    at = spec.index(b"nmt_nfkc") + len("nmt_nfkc") + 1
    size = shift = 0
    while True:
        size |= (spec[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if spec[at - 1] < 128:
            return bytes(spec[at : at + size])


KINDS = {
    "marian": ("en", "fr", ""),
    "marian-codes": ("en", "fra", ">>fra<< "),
    "marian-separate": ("en", "fr", ""),
    "m2m100": ("en", "fr", ""),
    "m2m100-special": ("en", "fr", ""),
    "nllb": ("eng_Latn", "fra_Latn", ""),
    "nllb-legacy": ("eng_Latn", "fra_Latn", ""),
    "t5": ("en", "fr", "translate English to French: "),
    "t5-clean": ("xx", "yy", ""),
}


@pytest.fixture(scope="module")
def cases(models: tuple[bytes, bytes], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    from deploykit.tasks.translation.export_tokenizer import save_translation_tokenizer

    root = tmp_path_factory.mktemp("tokenizers")
    write: dict[str, Callable[[Path], Any]] = {
        "marian": lambda folder: write_marian(folder, models),
        "marian-codes": lambda folder: write_marian(folder, models, codes=(">>deu<<", ">>fra<<")),
        "marian-separate": lambda folder: write_marian(folder, models, separate=True),
        "m2m100": lambda folder: write_m2m100(folder, models[1]),
        "m2m100-special": lambda folder: write_m2m100(
            folder, models[1], additional_special_tokens=["__en__", "__fr__"], clean_up_tokenization_spaces=True
        ),
        "nllb": lambda folder: write_nllb(folder),
        "nllb-legacy": lambda folder: write_nllb(folder, legacy_behaviour=True, clean_up_tokenization_spaces=True),
        "t5": lambda folder: write_t5(folder, models[0]),
        "t5-clean": lambda folder: write_t5(folder, models[0], clean_up_tokenization_spaces=True),
    }
    made = {}
    for kind, (source, target, prefix) in KINDS.items():
        checkpoint, folder = root / kind, root / f"{kind}-saved"
        folder.mkdir()
        reference = write[kind](checkpoint)
        save_translation_tokenizer(checkpoint, reference, folder)
        made[kind] = Case(reference, load_translation_tokenizer(folder, source, target), checkpoint, folder, prefix)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_hugging_faces_on_ten_thousand_strings(
    kind: str, cases: dict[str, Case], strings: list[str]
) -> None:
    case = cases[kind]
    ids = case.saved.encode(strings)
    for text, wanted, got in zip(strings, case.expected(strings), ids, strict=True):
        assert got == wanted, repr(text[:200])
    decoded = case.saved.decode(ids)
    for row, wanted_text, got_text in zip(ids, case.reference.batch_decode(ids, skip_special_tokens=True), decoded):
        assert got_text == wanted_text, row[:200]


@pytest.mark.parametrize("kind", KINDS)
def test_any_ids_decode_as_hugging_face_decodes_them(kind: str, cases: dict[str, Case]) -> None:
    """A model may generate any sequence: language tokens, </s> in the middle, pieces of the source language."""
    case = cases[kind]
    choice = random.Random(2)
    highest = len(case.reference) - 1
    rows = [[choice.randint(0, highest) for _ in range(choice.randint(0, 12))] for _ in range(2_000)]
    assert case.saved.decode(rows) == case.reference.batch_decode(rows, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(
        st.one_of(
            st.text(st.characters(exclude_categories=()), max_size=60),
            st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_any_text_is_tokenized_as_by_hugging_face(kind: str, cases: dict[str, Case], texts: list[str]) -> None:
    case = cases[kind]
    ids = case.saved.encode(texts)
    assert ids == case.expected(texts)
    assert case.saved.decode(ids) == case.reference.batch_decode(ids, skip_special_tokens=True)
    assert [case.saved.encode([text])[0] for text in texts] == ids


@pytest.mark.parametrize("kind", ["marian", "m2m100"])
def test_added_tokens_keep_their_flags(kind: str, models: tuple[bytes, bytes], tmp_path: Path) -> None:
    from transformers import AddedToken

    from deploykit.tasks.translation.export_tokenizer import save_translation_tokenizer

    checkpoint = tmp_path / kind
    reference = write_marian(checkpoint, models) if kind == "marian" else write_m2m100(checkpoint, models[1])
    flags = {"[left]": {"lstrip": True}, "[right]": {"rstrip": True}, "word": {"single_word": True}}
    reference.add_tokens([AddedToken(token, **flag) for token, flag in flags.items()])
    reference.add_tokens(["[x1]", "[x10]", "[x1"])
    save_translation_tokenizer(checkpoint, reference, tmp_path)
    saved = load_translation_tokenizer(tmp_path, "en", "fr")
    choice = random.Random(3)
    parts = [*flags, "[x1]", "[x10]", "[x1", " ", "  ", "a", "words", "[", "\n"]
    texts = ["".join(choice.choices(parts, k=choice.randint(1, 8))) for _ in range(2_000)]
    ids = saved.encode(texts)
    assert ids == reference(texts)["input_ids"]
    assert saved.decode(ids) == reference.batch_decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["marian", "nllb"])
def test_special_tokens_in_text_may_be_plain_text(kind: str, models: tuple[bytes, bytes], tmp_path: Path) -> None:
    from deploykit.tasks.translation.export_tokenizer import save_translation_tokenizer

    checkpoint = tmp_path / kind
    reference = write_marian(checkpoint, models) if kind == "marian" else write_nllb(checkpoint)
    reference.split_special_tokens = True
    save_translation_tokenizer(checkpoint, reference, tmp_path)
    saved = load_translation_tokenizer(tmp_path, "eng_Latn", "fra_Latn")
    assert saved.encode(HOSTILE[:1]) == reference([""])["input_ids"]
    texts = [text for text in HOSTILE if text.isprintable()]
    assert saved.encode(texts) == reference(texts)["input_ids"]


def test_ids_that_the_model_has_and_the_tokenizer_lacks_decode(models: tuple[bytes, bytes], tmp_path: Path) -> None:
    from deploykit.tasks.translation.export_tokenizer import save_translation_tokenizer

    reference = write_m2m100(tmp_path / "m2m", models[1])
    save_translation_tokenizer(tmp_path / "m2m", reference, tmp_path)
    beyond = [[len(reference) + 500, 10], [10, 10_000_000]]
    saved = load_translation_tokenizer(tmp_path, "en", "fr")
    assert saved.decode(beyond) == reference.batch_decode(beyond, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_no_texts_give_no_ids(kind: str, cases: dict[str, Case]) -> None:
    saved = cases[kind].saved
    assert saved.encode([]) == []
    assert saved.decode([]) == []
    assert saved.decode([[]]) == [""]
    assert saved.decode([[], []]) == ["", ""]


@pytest.mark.parametrize("kind", ["m2m100", "nllb"])
def test_language_tokens_are_those_that_generation_is_forced_to_begin_with(kind: str, cases: dict[str, Case]) -> None:
    case = cases[kind]
    source, target, _ = KINDS[kind]
    wanted = case.reference._build_translation_inputs("x", src_lang=source, tgt_lang=target, return_tensors=None)
    assert case.saved.language_token() == case.saved.language_token(target) == wanted["forced_bos_token_id"]
    assert case.saved.language_token(source) == case.saved.encode(["x"])[0][0]
    assert len(case.saved.languages) >= 100


def test_source_language_is_the_one_loaded_with(cases: dict[str, Case]) -> None:
    for kind, source in (("m2m100", "de"), ("nllb", "deu_Latn"), ("nllb-legacy", "deu_Latn")):
        case = cases[kind]
        case.reference.src_lang = source
        try:
            wanted = case.reference(["Straße"])["input_ids"]
        finally:
            case.reference.src_lang = KINDS[kind][0]
        assert load_translation_tokenizer(case.folder, source, KINDS[kind][1]).encode(["Straße"]) == wanted


def test_another_target_language_changes_the_prefix(cases: dict[str, Case]) -> None:
    marian, t5 = cases["marian-codes"], cases["t5"]
    assert marian.saved.languages == ("deu", "fra")
    assert marian.saved.encode(["x"], "deu") == marian.reference([">>deu<< x"])["input_ids"]
    assert t5.saved.languages == ("de", "fr")
    assert t5.saved.encode(["x"], "de") == t5.reference(["translate English to German: x"])["input_ids"]
    assert marian.saved.language_token("deu") is None
    assert t5.saved.language_token() is None


def test_a_pair_that_the_checkpoint_has_no_prefix_for_gets_the_one_saved(
    models: tuple[bytes, bytes], tmp_path: Path
) -> None:
    from deploykit.tasks.translation.export_tokenizer import save_translation_tokenizer

    reference = write_t5(tmp_path / "t5", models[0])
    save_translation_tokenizer(tmp_path / "t5", reference, tmp_path, prefix="into Breton: ")
    assert load_translation_tokenizer(tmp_path, "en", "br").encode(["x"]) == reference(["into Breton: x"])["input_ids"]


@pytest.mark.parametrize("kind", ["marian-codes", "m2m100", "nllb", "t5"])
def test_an_unknown_target_is_refused_with_those_known(kind: str, cases: dict[str, Case]) -> None:
    saved = cases[kind].saved
    for ask in (lambda: saved.encode(["x"], "tlh"), lambda: saved.language_token("tlh")):
        with pytest.raises(UsageError, match="unknown target language 'tlh'") as refusal:
            ask()
        assert sorted(saved.languages)[0] in str(refusal.value.remedy)
    if kind != "t5":
        with pytest.raises(UsageError, match="unknown target language 'tlh'"):
            load_translation_tokenizer(cases[kind].folder, KINDS[kind][0], "tlh")


def test_an_unknown_source_is_refused(cases: dict[str, Case]) -> None:
    with pytest.raises(UsageError, match="unknown source language 'tlh'"):
        load_translation_tokenizer(cases["m2m100"].folder, "tlh", "fr")


def test_a_checkpoint_of_one_pair_refuses_another_target(cases: dict[str, Case]) -> None:
    saved = cases["marian"].saved
    assert saved.languages == ()
    assert saved.encode(["x"], "fr") == saved.encode(["x"])
    with pytest.raises(UsageError, match="unknown target language 'de'") as refusal:
        saved.encode(["x"], "de")
    assert "'fr' alone" in str(refusal.value.remedy)


@pytest.mark.parametrize("kind", ["marian-separate", "m2m100", "nllb", "t5"])
def test_each_file_missing_or_broken_is_named(kind: str, cases: dict[str, Case], tmp_path: Path) -> None:
    source, target, _ = KINDS[kind]
    files = {path.name for path in cases[kind].folder.iterdir()}
    assert files <= {
        "translation_tokenizer.json",
        "source.spm",
        "target.spm",
        "vocab.json",
        "tokens.json",
        "tokenizer.json",
    }
    for name in files:
        for broken in (None, b"", b"\xff not it", b"[1]", b'{"a": "b"}'):
            folder = tmp_path / f"{name}-{broken!r:.9}"
            shutil.copytree(cases[kind].folder, folder, dirs_exist_ok=True)
            if broken is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(broken)
            with pytest.raises(ArtifactError, match=name):
                load_translation_tokenizer(folder, source, target)


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("marian", "source.spm"),
        ("marian", "target.spm"),
        ("marian", "vocab.json"),
        ("m2m100", "sentencepiece.bpe.model"),
        ("m2m100", "vocab.json"),
        ("nllb", "tokenizer.json"),
        ("t5", "tokenizer.json"),
    ],
)
def test_a_checkpoint_without_its_tokenizer_files_is_refused_by_their_name(
    kind: str, file: str, cases: dict[str, Case], tmp_path: Path
) -> None:
    from deploykit.tasks.translation.export_tokenizer import check_tokenizer_files, save_translation_tokenizer

    case = cases[kind]
    checkpoint, folder = tmp_path / "checkpoint", tmp_path / "saved"
    folder.mkdir()
    shutil.copytree(case.checkpoint, checkpoint)
    check_tokenizer_files(checkpoint)
    (checkpoint / file).unlink()
    with pytest.raises(ArtifactError, match=f"has no {file}"):
        save_translation_tokenizer(checkpoint, case.reference, folder)
    (checkpoint / "tokenizer_config.json").unlink()
    if kind != "nllb":  # its config.json equals M2M100's
        with pytest.raises(ArtifactError, match=f"has no {file}"):
            check_tokenizer_files(checkpoint)
    assert not list(folder.iterdir())


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    from deploykit.tasks.translation.export_tokenizer import save_translation_tokenizer

    with pytest.raises(ArtifactError, match="OddTokenizer is not supported"):
        save_translation_tokenizer(tmp_path, type("OddTokenizer", (), {"is_fast": False})(), tmp_path)
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "<s>": 2}, "<unk>"))
    backend.post_processor = processors.TemplateProcessing(
        single="</s> $A <s>", special_tokens=[("<s>", 2), ("</s>", 1)]
    )
    odd = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="</s>")
    with pytest.raises(ExportError, match="differs from the checkpoint's"):
        save_translation_tokenizer(tmp_path, odd, tmp_path)


@pytest.mark.parametrize("kind", ["marian", "m2m100", "nllb", "t5"])
@pytest.mark.parametrize("unit", ["a", "我", "word ", "A sentence. ", "\U0001f389"])
def test_a_line_of_fifty_thousand_characters_is_cut_to_fit_in_linear_work(
    kind: str, unit: str, cases: dict[str, Case]
) -> None:
    saved = cases[kind].saved
    text = (unit * 50_000)[:50_000]
    read = 0

    def tokens(piece: str) -> int:
        nonlocal read
        read += len(piece)
        return len(saved.encode([piece])[0])

    pieces = fit(text, tokens, 512)
    assert "".join(piece + space for piece, space in pieces) == text
    assert all(len(ids) <= 512 for ids in saved.encode([piece for piece, _ in pieces]))
    assert read <= 16 * len(text), "twice what halving a piece again and again needs"


def test_the_runtime_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, deploykit.tasks.translation.tokenizer\n"
        "assert not {'torch', 'transformers', 'sacremoses'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
