"""Write clip_bpe.json: difficult texts and their token ids by OpenAI's tokenizer.

    pip install --no-deps clip-anytorch==2.6.0 && pip install ftfy==6.3.1 regex==2026.11.15
    python tests/golden/make_clip_bpe.py

clip-anytorch is OpenAI's code with a setup.py. Only its simple_tokenizer.py is loaded: no torch is needed.
"""

import hashlib
import importlib.util
import json
import pathlib
import random

TEXTS = {
    "plain": [
        "a happy dog",
        "A photo of a CAT.",
        "hello world!!!",
        "Two dogs, one frisbee; zero cats?",
        "x",
        "!",
        "  ",
    ],
    "empty": ["", " ", "\n\t ", "\u00a0", "\u3000", "\u200b", "\ufeff"],
    "digits": ["12345 apples", "3.14159", "1st 2nd 3rd", "2021-03-01", "١٢٣", "½ cup", "x² + y³", "Ⅻ"],
    "contractions": ["it's", "IT'S", "don't won't can't", "they're we've I'm you'll he'd", "'s 't 're", "rock'n'roll"]
    + ["it’s a dog’s life", "'ſ", "it'ſ", "'S'T'RE"],
    "case": ["İstanbul", "ẞ STRASSE", "ΣΊΣΥΦΟΣ", "camelCaseWord", "ǅ", "ﬁne ﬂour"],
    "emoji": ["😀", "👩‍👩‍👧‍👦 family", "🇩🇪🇫🇷", "👍🏽👍🏿", "❤️ love", "1️⃣ keycap", "😀😀😀", "🏴󠁧󠁢󠁥󠁮󠁧󠁿"],
    "scripts": [
        "一只快乐的狗",
        "幸せな犬",
        "행복한 개",
        "счастливая собака",
        "كلب سعيد",
        "खुश कुत्ता",
        "สุนัขมีความสุข",
        "Ευτυχισμένο σκυλί",
    ]
    + ["ｆｕｌｌｗｉｄｔｈ", "e\u0301 é", "Z̸̛a̷l̵g̶o̴", "ᏣᎳᎩ", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "שלום", "a\u0308\u0323"],
    "entities": [
        "&lt;b&gt;",
        "&amp;amp;",
        "Q&A",
        "AT&T",
        "&#128054;",
        "&#x1F436;",
        "&nbsp;x&nbsp;",
        "&eacute;t&eacute;",
        "&amp;lt;",
    ]
    + ["&notanentity;", "&amp;#39;s", "&quot;quoted&quot;", "a & b", "&copy 2021", "&#xD800;", "&#0;", "&hellip;"],
    "mojibake": [
        "cafÃ©",
        "â€œquotedâ€\x9d",
        "donâ€™t",
        "Ã¼ber",
        "Ð¿Ñ€Ð¸Ð²ÐµÑ‚",
        "ðŸ˜€",
        "schÃ¶n &amp; gut",
        "voilÃ  le travail",
    ],
    "control": [f"a{chr(code)}b" for code in (*range(0x20), 0x7F, 0x85, 0x9F, 0xAD, 0x2028, 0x2029, 0xFEFF, 0xFFFD)]
    + ["\x1cstart", "end\x1f", "\x1b[31mred\x1b[0m", "\r\nline\r\n", "a\x1c \x1db", "\ud83d\ude00", "lone \ud800 half"],
    "special": [
        "<|endoftext|>",
        "<|startoftext|> dog",
        "a<|endoftext|>b",
        "<|ENDOFTEXT|>",
        "<|endoftext",
        "<|ſtartoftext|>",
    ]
    + ["<start_of_text>", "<end_of_text>", "</w>", "dog</w>", "<|endoftext|>'s", "!<|endoftext|>"],
    "web": [
        "https://example.com/a?b=c&d=e#f",
        "user@example.com",
        "#hashtag @mention",
        "C:\\dir\\file.jpg",
        "IMG_20210301.JPG",
    ]
    + [
        "<a href='x'>y</a>",
        "lol :-) ;D",
        "$9.99 €5 £3 ¥100",
        "50% off!!!",
        "———",
        "...",
        "…",
        "“smart” ‘quotes’",
        "`~^|\\{}[]",
    ],
    "long words": [
        "supercalifragilisticexpialidocious",
        "a" * 70,
        "ab" * 100,
        "漢" * 90,
        "pneumono" * 20,
        "=" * 100,
        "aaab" * 40,
    ],
}
REPEATED = [("a happy dog ", 10_000), ("wörd ", 10_000), ("z", 3_000), ("犬", 2_000), ("😀 ", 500)]
FUZZ, SEED = 250, 0
ALPHABETS = [
    "abcdefghij 'st",
    "abc ABC 123 .,!?'-",
    "éèüßñ çøåœ ",
    "&;#x0123456789 ltgampquot",
    "犬猫 日本語中文한국",
    "😀👍🏽❤️‍🔥 ",
]
ALPHABETS += ["Ã©â€™œ\x9d ðŸ˜", "\x00\x1b\x1c\x1f\x7f\x85\u200b\u2028 ab", "αβγ ДЖЗ אבג عغ हिं ", "<|startofend>ſ "]


def texts():
    """Yield (group, text, times)."""
    for group, members in TEXTS.items():
        yield from ((group, text, 1) for text in members)
    yield from (("repeated", text, times) for text, times in REPEATED)
    draw = random.Random(SEED)
    for _ in range(FUZZ):
        letters = "".join(draw.sample(ALPHABETS, draw.randint(1, 2)))
        yield "fuzz", "".join(draw.choices(letters, k=draw.randint(1, 30))), 1


def openai_tokenizer():
    folder = importlib.util.find_spec("clip").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("simple_tokenizer", pathlib.Path(folder) / "simple_tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def main():
    tokenizer = openai_tokenizer()
    rows = []
    for group, text, times in texts():
        ids = tokenizer.encode(text * times)
        kept = {"ids": ids} if times == 1 else {"sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest()}
        rows.append({"group": group, "text": text, "times": times, "count": len(ids), **kept})
    command = " && ".join(line.strip() for line in __doc__.splitlines() if line.startswith("    "))
    lines = ",\n".join(json.dumps(row) for row in rows)
    target = pathlib.Path(__file__).with_name("clip_bpe.json")
    target.write_text(f'{{"command": {json.dumps(command)},\n"rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
