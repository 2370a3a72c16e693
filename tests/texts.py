"""A tiny tokenizer and generated texts of three domains, for the models of architectures.py."""

import random
import string

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.architectures import VOCAB

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_SHARED = "the of and a to in is that for with as on by it from was are this be at"
_WORDS = {
    "code": """def return class import loop value list index print none true false lambda yield
        async raise float tuple string object""",
    "law": """court judge appeal statute plaintiff contract clause breach verdict counsel tort
        liable motion ruling petition evidence witness sentence treaty damages""",
    "medicine": """patient dose renal fever acute lesion biopsy tumour cardiac therapy symptom
        chronic plasma nerve vaccine insulin artery trauma clinic syndrome""",
}
SHARED = tuple(_SHARED.split())
WORDS = {domain: tuple(words.split()) for domain, words in _WORDS.items()}
CHARACTERS = "\n " + string.ascii_letters + string.digits + string.punctuation[:-1]


def tiny_tokenizer(kind="words", *, bos=False):
    """Return a fast tokenizer of at most 99 ids: one per known word, or one per character.

    Both know nothing but ASCII: whatever else is in a text becomes ``<unk>``.
    """
    units = [*SHARED, *(word for words in WORDS.values() for word in words)]
    known = units if kind == "words" else list(CHARACTERS)
    vocabulary = {unit: index for index, unit in enumerate([*SPECIAL, *known])}
    if len(vocabulary) > VOCAB:
        raise ValueError(f"{len(vocabulary)} ids do not fit a tiny model's {VOCAB}")
    if kind == "words":
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
        tokenizer.decoder = decoders.Fuse()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )


def documents(domain, count=10, words=20, seed=0):
    """Return different generated documents; every third word is of the domain's own."""
    generator = random.Random(f"{domain}/{seed}")
    texts = []
    for _ in range(count):
        drawn = [
            generator.choice(SHARED if position % 3 else WORDS[domain]) for position in range(words)
        ]
        texts.append(" ".join(drawn))
    return texts


def save_documents(folder, domain, **options):
    """Write generated documents as one file each; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, text in enumerate(documents(domain, **options)):
        (folder / f"{domain}{index:03}.txt").write_text(text, encoding="utf-8")
    return folder
