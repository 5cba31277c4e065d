"""Write ruler_prompts.json: hashes of the prompts that lm-eval's RULER generator makes of words and text of our own.

    python tests/goldens/make_ruler_goldens.py

Needs lm-eval 0.4.13 with wonderwords and nltk. Tokens are bytes, and sentences end with ". ", so that the test needs
neither word lists nor NLTK's data. Each hash is over prompts, first words of the answers, and values.
"""

import hashlib
import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
LENGTHS = (700, 1500, 3000, 5000, 20_000)
COUNT = 8
KEYS = [f"{a}-{b}" for a in ("big", "old", "red") for b in ("fox", "hat", "jar", "key")]
ESSAY = " ".join(f"Sentence {i} is about {i * i % 97} things." for i in range(2000)).split(" ")
VARIANTS = {
    "niah_single_1": ("repeat", "numbers"),
    "niah_single_2": ("essay", "numbers"),
    "niah_single_3": ("essay", "uuids"),
}


def sentences(text):
    """A splitter that needs no data."""
    return text.replace(". ", ".\n").split("\n")


def digest(samples):
    """Hash of (prompt, value) pairs."""
    return hashlib.sha256(json.dumps(samples).encode()).hexdigest()


def main():
    from lm_eval.tasks.ruler import prepare_niah
    from lm_eval.tasks.ruler.niah_utils import TEMPLATE

    from jaxlin.convert import byte_tokenizer

    prepare_niah.WORDS = KEYS
    prepare_niah.cached_sent_tokenize = sentences
    found = {}
    for name, (haystack, values) in VARIANTS.items():
        for length in LENGTHS:
            random.seed(1)
            samples = prepare_niah.generate_samples(
                ESSAY if haystack == "essay" else prepare_niah.get_haystack(type_haystack="repeat"),
                max_seq_length=length,
                template=TEMPLATE,
                type_haystack=haystack,
                type_needle_k="words",
                type_needle_v=values,
                num_samples=COUNT,
                TOKENIZER=byte_tokenizer(),
            )
            found[f"{name} {length}"] = digest([[f"{s['input']} {s['gen_prefix']}", s["outputs"][0]] for s in samples])
    (HERE / "ruler_prompts.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
