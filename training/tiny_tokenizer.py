"""The tokenizer of the tiny bundle: a few hundred English words about moving figures, and bytes for everything else.

It has the form of a T5 tokenizer (pad 0, `</s>` 1, `<unk>` 2, unigram pieces with "▁" for a leading space, `</s>` added
to every text), so it is read by the code that reads the tokenizer of UMT5-XXL. Text is lower-cased, which the large one
does not do: a vocabulary this small has no room for both cases.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")

# in order of importance: a vocabulary that is too small for all of them loses the last ones
_WORD_LIST = """
a an the this that these those and or but with without of in on at by from to into onto over under above below
behind before after near beside between through across along around up down left right front back forward
backward out off is are was be being has have his her its their one two three four five six many some all both
each other another same no not very more less then while as like he she it they who

person man woman boy girl child figure character dancer people someone puppet doll robot athlete player body
head face hair neck eye eyes nose mouth ear ears shoulder shoulders chest back waist hip hips arm arms elbow
elbows forearm wrist wrists hand hands finger fingers leg legs thigh knee knees shin ankle foot feet toe toes
limb limbs torso skin skeleton pose stick

walk walks walking run runs running jump jumps jumping dance dances dancing wave waves waving kick kicks kicking
squat squats squatting stretch stretches stretching turn turns turning bend bends bending sit sits sitting stand
stands standing lie lies lying kneel kneels kneeling crouch crouches crouching hop hops hopping skip skips
skipping spin spins spinning twist twists twisting bow bows bowing clap claps clapping point points pointing
raise raises raising raised lower lowers lowering lift lifts lifting swing swings swinging step steps stepping
reach reaches reaching throw throws throwing catch catches catching push pushes pushing pull pulls pulling punch
punches punching climb climbs climbing crawl crawls crawling swim swims swimming march marches marching stomp
tiptoe balance balances balancing lean leans leaning nod nods nodding shake shakes shaking look looks looking
move moves moving motion movement hold holds holding lunge lunges lunging jack jacks semaphore signal signals
exercise gesture gestures greet greets greeting stop stops stopping start starts starting rest rests resting
slide slides sliding roll rolls rolling sway sways swaying bounce bounces bouncing flap flaps

red green blue yellow orange purple violet pink brown black white grey gray cyan magenta teal turquoise navy
maroon beige golden gold silver cream olive lime crimson scarlet indigo lavender peach tan ivory dark light
bright pale deep warm cold plain striped stripes dotted checked patterned colourful colorful colour color
colours colors coloured colored motley

shirt trousers pants shorts skirt dress jacket coat sweater hoodie vest suit uniform robe cloak cape scarf belt
tie glove gloves sock socks shoe shoes boot boots sandal sandals sneakers hat cap helmet hood crown mask glasses
clothes clothing outfit costume sleeve sleeves jeans dressed wearing wears wear bare blond long short curly
straight bald

sky ground floor wall grass field park garden forest tree trees hill hills mountain mountains river lake sea
beach sand street road city house room studio stage background scene backdrop gradient horizon disc discs ball
circle square shadow camera view shot front side close wide frame video picture image drawing cartoon animation
flat simple centre center middle corner edge top bottom

sun sunny sunlight sunset sunrise cloud clouds cloudy rain rainy snow snowy wind windy storm stormy fog foggy
mist misty day night morning noon evening dusk dawn summer winter spring autumn weather hot wet dry clear

fast slow slowly quickly quick gently gentle smooth smoothly steady steadily sudden suddenly energetic calm
lively graceful high low small big large tall little thin thick wide narrow round young old happy sad tired
strong first second last again twice once together alone still rhythm beat time times loop motley falling
"""
WORDS = tuple(dict.fromkeys(_WORD_LIST.split()))
_ENDINGS = ("es", "ed", "ing", "er", "est", "ly", "ful", "less", "ness")
_CHARACTERS = tuple(chr(code) for code in range(0x21, 0x7F) if not chr(code).isupper())

# log probabilities: only their order matters. A word is cheaper than a stem and an ending, and that than letters; the
# reserved pieces (raw bytes, spare ids) are dearer than any spelling of their own names.
_WORD, _ENDING, _CHARACTER, _RESERVED = -8.0, -9.0, -20.0, -1000.0


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json; the same bytes for the same size.

    Args:
        directory: created if it is not there.
        vocab_size: number of ids, which is the number of rows of the embedding table. Words that do not fit are left
            out; ids that are left over become spare `<extra_id_n>`, as in T5.

    Raises:
        ValueError: vocab_size is too small for the bytes and characters that every text needs.
    """
    pieces = _pieces(vocab_size)
    tokenizer = Tokenizer(Unigram(pieces, unk_id=SPECIAL_TOKENS.index("<unk>"), byte_fallback=True))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", SPECIAL_TOKENS.index("</s>"))]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = dict(zip(("pad_token", "eos_token", "unk_token"), SPECIAL_TOKENS, strict=True))
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / "tokenizer.json", json.loads(tokenizer.to_str()))
    _write(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})
    _write(directory / "special_tokens_map.json", special)


def _pieces(vocab_size: int) -> list[tuple[str, float]]:
    """Every id's piece and log probability, in order."""
    needed = [(token, 0.0) for token in SPECIAL_TOKENS]
    needed += [(f"<0x{byte:02X}>", _RESERVED) for byte in range(256)]
    needed += [(character, _CHARACTER) for character in ("▁", *_CHARACTERS)]
    needed += [(ending, _ENDING) for ending in _ENDINGS]
    if vocab_size < len(needed):
        raise ValueError(f"vocab_size must be at least {len(needed)}, got {vocab_size}")
    pieces = (needed + [(f"▁{word}", _WORD) for word in WORDS])[:vocab_size]
    return pieces + [(f"<extra_id_{spare}>", _RESERVED) for spare in range(vocab_size - len(pieces))]


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
