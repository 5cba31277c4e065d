"""Write smollm_tokenizer.json: how SmolLM2's own tokenizer cuts and encodes difficult text.

    JAXLIN_DATA=... python tests/goldens/make_tokenizer_goldens.py

JAXLIN_DATA is a folder with teacher/tokenizer.json, the tokenizer of HuggingFaceTB/SmolLM2-135M-Instruct.
"""

import json
import os
from pathlib import Path

HERE = Path(__file__).parent
TEXTS = [
    "",
    "List:\n\n1.",
    "List:\n\n1. one\n2. two\n\n\n10. ten",
    "In 1984, 3.14159 x 2,718 = 8539.8; call +44 20 7946 0018.",
    " 1 22  333   4444\t55555\n666666",
    "a1b2c3 v1.2.3-rc4 0x1F 1e-5 ½ ² Ⅷ ٣ 五 ①",
    "   leading, trailing and  inner   spaces   ",
    "\n\n\n\tmixed \t tabs\r\nand\r\rreturns\n \n  \n",
    "\u00a0no-break\u2003em space\u3000ideographic\u200bzero width",
    "def f(x):\n    if x >= 10:\n        return x**2  # it's 100%\n    return {'a': [1, 2], \"b\": None}\n",
    "for (int i = 0; i < 42; ++i) { arr[i] += 0x7f & ~mask; }",
    "I'm you're he'd we'll they've don't IT'S 'tis o'clock",
    "naïve café Ångström façade Zürich señor œuvre ﬁ e\u0301",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם مرحبا 你好，世界。こんにちは 안녕하세요 नमस्ते",  # noqa: RUF001
    "😀 👩‍👩‍👧‍👦 🇫🇷 👍🏽 ❤️ x😀1",
    "<|im_start|>user\nWhat is 7 * 6?<|im_end|>\n<|im_start|>assistant\n42<|im_end|>\n",
    "a<|endoftext|>b <|endoftext|> c<file_sep><im_end>",
    "$12.50 €3,000 50% #1 @user https://example.org/a?b=1&c=2 C:\\dir\\x \\frac{1}{2}",
    "!!!??? ... --- ___ *** ((())) <<<>>> '''\"\"\"",
    "\x00\x01\x7f\ufeff\ufffd",
]


def main() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(os.environ["JAXLIN_DATA"]) / "teacher" / "tokenizer.json"))
    cases = [
        {
            "text": text,
            "pieces": [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)],
            "ids": tokenizer.encode(text).ids,
        }
        for text in TEXTS
    ]
    lines = ",\n".join(json.dumps(case) for case in cases)
    (HERE / "smollm_tokenizer.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
