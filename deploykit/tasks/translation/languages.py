"""Parse language codes of every convention, and tell a text's language by its letters and function words.

langcodes reads most codes, but neither names (French) nor sr@latin, and has no letters and function words.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

# Languages by script (ISO 15924): the ISO 639-1 code, then its other codes and names.
_LANGUAGES = """
Latn: af=afr=afrikaans az=aze=azj bs=bos ca=cat=catalan cs=ces=cze=czech cy=cym=welsh da=dan=danish
Latn: de=deu=ger=german en=eng=english eo=epo es=spa=spanish et=est=estonian eu=eus=baq=basque
Latn: fi=fin=finnish fr=fra=fre=french ga=gle=irish gl=glg=galician ha=hau hr=hrv=croatian ht=hat
Latn: hu=hun=hungarian id=ind=in=indonesian is=isl=ice=icelandic it=ita=italian jv=jav la=lat=latin
Latn: lt=lit=lithuanian lv=lav=lvs=latvian ms=msa=zsm=malay mt=mlt nl=nld=dut=dutch
Latn: no=nor=nb=nob=nn=nno=norwegian pl=pol=polish pt=por=portuguese ro=ron=rum=romanian
Latn: sk=slk=slo=slovak sl=slv=slovenian so=som sq=sqi=als sv=swe=swedish sw=swa=swh tl=tgl=fil
Latn: tr=tur=turkish uz=uzn vi=vie=vietnamese xh=xho yo=yor zu=zul
Cyrl: be=bel bg=bul=bulgarian kk=kaz ky=kir mk=mkd=mac mn=mon=khk ru=rus=russian tg=tgk tt=tat
Cyrl: uk=ukr=ukrainian
Cyrl+Latn: sr=srp=serbian
Arab: ar=ara=arb=arabic ckb ps=pus=pbt fa=fas=per=pes=persian=farsi sd=snd ug=uig ur=urd=urdu
Hebr: he=heb=iw=hebrew yi=yid=ydd
Deva: hi=hin=hindi mr=mar ne=nep=npi sa=san
Beng: bn=ben=bengali as=asm
Guru: pa=pan
Gujr: gu=guj
Orya: or=ory
Taml: ta=tam=tamil
Telu: te=tel
Knda: kn=kan
Mlym: ml=mal
Sinh: si=sin
Thai: th=tha=thai
Laoo: lo=lao
Mymr: my=mya=bur
Khmr: km=khm
Tibt: bo=bod
Geor: ka=kat=geo
Armn: hy=hye=arm
Grek: el=ell=gre=greek
Ethi: am=amh ti=tir
Kore: ko=kor=korean
Jpan: ja=jpn=japanese
Hani: zh=zho=chi=cmn=yue=chinese
"""
# Script -> first words of the Unicode names of its letters.
_LETTERS = {
    "Latn": ("LATIN",),
    "Cyrl": ("CYRILLIC",),
    "Arab": ("ARABIC",),
    "Hebr": ("HEBREW",),
    "Deva": ("DEVANAGARI",),
    "Beng": ("BENGALI",),
    "Guru": ("GURMUKHI",),
    "Gujr": ("GUJARATI",),
    "Orya": ("ORIYA",),
    "Taml": ("TAMIL",),
    "Telu": ("TELUGU",),
    "Knda": ("KANNADA",),
    "Mlym": ("MALAYALAM",),
    "Sinh": ("SINHALA",),
    "Thai": ("THAI",),
    "Laoo": ("LAO",),
    "Mymr": ("MYANMAR",),
    "Khmr": ("KHMER",),
    "Tibt": ("TIBETAN",),
    "Geor": ("GEORGIAN",),
    "Armn": ("ARMENIAN",),
    "Grek": ("GREEK",),
    "Ethi": ("ETHIOPIC",),
    "Hang": ("HANGUL",),
    "Kore": ("HANGUL", "CJK"),
    "Jpan": ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "IDEOGRAPHIC"),
    "Hani": ("CJK", "BOPOMOFO", "IDEOGRAPHIC"),
    "Hans": ("CJK", "BOPOMOFO", "IDEOGRAPHIC"),
    "Hant": ("CJK", "BOPOMOFO", "IDEOGRAPHIC"),
}
_CHINESE_OF_REGION = {"CN": "Hans", "SG": "Hans", "TW": "Hant", "HK": "Hant", "MO": "Hant"}
_MODIFIERS = {"latin": "Latn", "cyrillic": "Cyrl"}  # gettext's
_SPACELESS = {"Thai", "Laoo", "Mymr", "Khmr", "Tibt", "Jpan", "Hani", "Hans", "Hant"}
# The most frequent function words. Words in two lists tell nothing and are not used.
_FUNCTION_WORDS = {
    "en": "the of and to is that for with this are not be it you was have from by or an can will your which",
    "fr": "le la les des du et une est pour dans que qui sur pas avec cette au aux vous ne ce sont être par ou votre",
    "de": "der die das und ist nicht ein eine zu mit den von für auf dem werden wird sie oder bei einen auch sind",
    "es": "el los las del y una es para con por que no se su como está más lo este esta ser al o",
    "it": "il gli della di e una è per con non che sono nel alla questo più un dei le la lo si o",
    "pt": "os do da dos das e uma é para com não em no na que por um mais ou ao seu o a são",
    "nl": "de het een van voor met niet zijn en is op te dat wordt deze naar of aan worden bij ook",
    "sv": "och att det som är på för inte med den till ett av en kan eller från har",
    "pl": "nie na do się jest że to jak ale przez dla oraz lub w z i są czy",
    "ro": "și este nu pentru care cu pe sau din să sunt un o de la în mai acest",
    "tr": "ve bir bu için ile olarak değil var veya daha kadar olan",
}
_WORD = re.compile(r"[^\W\d_]+")
_ASCII_LETTER = re.compile(r"[A-Za-z]")


@dataclass(frozen=True)
class Language:
    """A parsed language code. ``base`` is the ISO 639-1 code if there is one; ``script`` is an ISO 15924 code."""

    base: str
    script: str | None = None
    region: str | None = None

    @property
    def letters(self) -> frozenset[str]:
        """First words of the Unicode names of the language's letters; empty if unknown."""
        scripts = (self.script,) if self.script in _LETTERS else _SCRIPTS_OF.get(self.base, ())
        return frozenset(letter for script in scripts for letter in _LETTERS[script])

    @property
    def has_spaces(self) -> bool:
        """Whether words are separated by spaces."""
        return (self.script or "".join(_SCRIPTS_OF.get(self.base, ()))) not in _SPACELESS


def _tables() -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    names: dict[str, str] = {}
    scripts: dict[str, tuple[str, ...]] = {}
    for line in _LANGUAGES.strip().splitlines():
        script, _, languages = line.partition(":")
        for aliases in languages.split():
            base, *others = aliases.split("=")
            scripts[base] = tuple(script.split("+"))
            names.update(dict.fromkeys([base, *others], base))
    return names, scripts


_BASES, _SCRIPTS_OF = _tables()
_LANGUAGE_OF_WORD = {
    word: language
    for language, words in _FUNCTION_WORDS.items()
    for word in words.split()
    if sum(word in other.split() for other in _FUNCTION_WORDS.values()) == 1
}


@lru_cache(maxsize=4096)
def parse_language(code: str) -> Language:
    """Parse "en", "eng_Latn", "en_XX", "pt-BR", "zh_Hant_TW", "sr@latin" or "French".

    An unknown code is its own base.
    """
    base, *parts = re.split(r"[-_@]", code.strip().partition(".")[0])
    base, script, region = base.lower(), None, None
    for part in parts:
        if part.title() in _LETTERS:
            script = part.title()
        elif part.lower() in _MODIFIERS:
            script = _MODIFIERS[part.lower()]
        elif re.fullmatch(r"[A-Za-z]{2}|[0-9]{3}", part) and part.upper() != "XX":
            region = part.upper()
    base = _BASES.get(base, base)
    if base == "zh" and script is None:
        script = _CHINESE_OF_REGION.get(region or "")
    return Language(base, script, region)


def closest(code: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate for ``code``'s language: preferably of the same region, else without one, else of another.

    Scripts of a language (zh_Hans, zh_Hant) count as different languages. The first of equals wins.
    """
    ranked = [(r, name) for name in candidates if (r := distance(code, name)) is not None]
    return min(ranked, key=lambda pair: pair[0])[1] if ranked else None


def distance(code: str, other: str) -> int | None:
    """Return 0 for the same language and region, 1 or 2 for another region (see ``closest``), None for another
    language."""
    a, b = parse_language(code), parse_language(other)
    if a.base != b.base or (a.script and b.script and a.script != b.script):
        return None
    if a.region == b.region:
        return 0
    return 2 if a.region and b.region else 1


def letters_of(text: str) -> Counter[str]:
    """Count the letters of ``text`` by the first word of their Unicode names."""
    if text.isascii():
        return Counter({"LATIN": n} if (n := len(_ASCII_LETTER.findall(text))) else {})
    counts: Counter[str] = Counter()
    for character, n in Counter(text).items():
        if script := _script_of(character):
            counts[script] += n
    return counts


def fits_script(text: str, language: Language) -> bool:
    """Return whether at least half of the letters belong to ``language``'s script.

    A text without letters fits, and so does any text if the script is unknown. Latin names and code within another
    script are ignored, but a text of nothing else does not fit.
    """
    expected = language.letters
    counts = letters_of(text) if expected else Counter[str]()
    own = sum(counts[script] for script in expected)
    others = counts.total() - own - counts["LATIN"] * ("LATIN" not in expected)
    return not counts or (own > 0 and own >= others)


def function_words(text: str) -> Counter[str]:
    """Count the different function words of each language in ``text``, for the languages with a list."""
    words = set(_WORD.findall(text.casefold()))
    return Counter(language for word in words if (language := _LANGUAGE_OF_WORD.get(word)))


def has_function_words(languages: Sequence[Language]) -> bool:
    """Return whether ``function_words`` can distinguish these languages."""
    bases = {language.base for language in languages}
    return len(bases) == len(languages) and bases <= _FUNCTION_WORDS.keys()


@lru_cache(maxsize=65536)
def _script_of(character: str) -> str | None:
    # NFKC maps full-width, ligature and mathematical forms to plain letters.
    letter = unicodedata.normalize("NFKC", character)[0]
    if not unicodedata.category(letter).startswith("L"):
        return None
    first = unicodedata.name(letter, "").split(" ")[0]
    return None if first in ("MODIFIER", "") else first
