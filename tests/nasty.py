"""Strings and conversations that tell tokenizers apart, and the tokenizers of the family."""

import unicodedata
from pathlib import Path

FAMILY = {  # name: (folder with tokenizer.json, folder with tokenizer_config.json and perhaps chat_template.jinja)
    "phi-3": ("phi-3", "phi-3"),
    "phi-3-mini": ("phi-3-mini", "phi-3-mini"),
    "phi-3-medium": ("phi-3-medium", "phi-3-medium"),
    "phi-4": ("RECONSTRUCTED-phi-4", "phi-4-base"),
    "phi-4-mini": ("RECONSTRUCTED-phi-4-mini", "phi-4-mini"),
    "phi-4-mini-reasoning": ("RECONSTRUCTED-phi-4-mini", "phi-4-mini-reasoning"),
}
SPECIAL = ["<s>", "</s>", "<unk>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|placeholder1|>", "<|im_start|>",
           "<|im_end|>", "<|im_sep|>", "<|fim_prefix|>", "<|dummy_0|>", "<|dummy_85|>", "<|endofprompt|>", "<|tool|>", "<|/tool|>", "<|tag|>"]
SPACES = ["", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\r", " \n", "\n ", "\n\n\n   \n", "\v\f", "\x85", "\u00a0", "\u2003", "\u200b",
          "\u3000", "\u2028", "\ufeff", " " * 17, "\t\t\t", "\n" * 9]
PLAIN = [
    "The capital of France is", " The capital of France is", "The capital of France is ", "  two  double  spaces  ", "a", " a", "a ", "A",
    "Hello, world!", "hello world", "HELLO WORLD", "HeLLo WoRLD", "don't I'M we'll you'Ve 'sort 'S", "it's John's 'em", "I’m “quoted”",
    "snake_case camelCase PascalCase kebab-case SCREAMING_SNAKE", "x=1;y=2;", "def f(x):\n    return x**2\n", "if (a && !b) { c++; }\n",
    "\tint main(void)\n\t{\n\t\treturn 0;\n\t}\n", "<html><body class='x'>&amp;</body></html>", '{"key": [1, 2.5, null, true]}',
    "http://example.com/a?b=c&d=%20#e", "name@example.com", "C:\\path\\to\\file.txt", "/usr/local/bin", "~!@#$%^&*()_+`-=[]{}|;':\",./<>?",
    "1", "12", "123", "1234", "1234567890", "3.14159265358979", "1,000,000.00", "0x1F 0b101 1e-10", "-5 + 3 = -2", "2024-04-23T12:34:56Z",
    "½ ¼ ² ³ ① Ⅳ", "1st 2nd 3rd 4th", "...", "....", "!!!!!!!!", "??!?", "----------", "==========", "// / //\n", "a/b\r\n/c", "$100 €50 £20 ¥10",
    "ünïcödé çà ñ ß ø å", "e\u0301 vs é", "A\u030a Å \u212b", "ﬁ ﬂ ligatures", "ＦＵＬＬ ｗｉｄｔｈ", "ĲĳǅǄ", "ẞ ß SS", "İ ı I i", "Ω Ω µ μ",
    "Привет, мир", "Γειά σου Κόσμε", "שלום עולם", "مرحبا بالعالم", "‏مرحبا‎ abc", "\u202eRTL override\u202c", "नमस्ते दुनिया", "สวัสดีชาวโลก", "გამარჯობა",
    "안녕하세요 세계", "\u1112\u1161\u11ab", "你好，世界！", "分析", " こんにちは", "こんにちは、世界。", "日本語 と English の mix", "東京都 2024年", "𠮷野家", "㍿",
    "🙂", " 🙂", "🙂🙂", "a🙂b", "👍🏽", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇫🇷🇩🇪", "❤️", "☃", "🤷🏼‍♀️ ok", "\u200d", "x\u200dy", "\ufe0f", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "𝟙𝟚𝟛",
    "∑∫√∞≈≠", "→ ← ↔ ⇒", "░▒▓█", "┌─┐│└┘", "♔♕♖", "\U0010ffff", "\U000e0001", "\ufffd", "\ufffe\uffff", "\ue000",
    "\x00", "a\x00b", "\x00\x00", "\x01\x02\x03", "\x1b[31mred\x1b[0m", "\x7f", "\x80\x81", "\xad", "\x08",
    "▁", "▁▁", " ▁", "▁a", "a▁b", "▁ ▁", "_▁_", "<0x0A>", "<0x00>", "<0xFF> <0xE2>", "\\n \\t \\x00", "Ġ Ċ ĉ", "Ġhello", "âĢĻ", "##ing", "</w>",
    "z̵̢̛a̴l̶g̷o̸", "a" * 70, "ab" * 40, "the the the the the", "supercalifragilisticexpialidocious", "antidisestablishmentarianism's", "Donaudampfschifffahrt",
    "llllllllIIIIIIII", "xX" * 20, "\n\nHuman: hi\n\nAssistant:", "- item\n- item\n  - nested\n", "| a | b |\n|---|---|\n", "# Title\n\nText **bold** `code`\n",
    "```python\nprint('hi')\n```", "$$\\int_0^1 x^2\\,dx$$", "a\n\nb", "a \nb", "a\n b", "a  \n  b", "trailing newline\n", "\nleading newline", "tab\tseparated\tvalues",
    "Dr. Smith vs. Mr. Jones, Inc.", "3 cm x 5 cm @ 20°C ± 1%", "œuvre cœur", "naïve façade", "Zürich", "São Paulo", "Łódź", "Đà Nẵng", "Việt Nam", "Ünal Ö",
    " ?", " !", " .", " ,", "n't", " 's", "'", "''", "\"", "``", "…", "—", "–", "x ,y", "a .b", "do n't",
]
AROUND = ["{0}", "a{0}b", "a {0} b", "{0}\nHello", "{0}  Hello", "Hello\n{0}", "{0}{0}", " {0}", "{0} ", "x{0}\n\n  y", "{0}▁", "{0}é"]
BROKEN = ["<|user |>", "<|USER|>", "<| user|>", "<|user|", "|user|>", "< s>", "<S>", "</ s>", "<|endoftext|", "<<s>>", "<|<|end|>|>", "<s", "[INST] x [/INST]",
          "<|tool_call|>{\"a\": 1}<|/tool_call|>", "<|tool_response|> ok", "<|user|>\nHello<|end|>\n<|assistant|>", "<|user|>\nCount to 3<|end|>\n<|assistant|>",
          "a<|end|>b", "a<|end|> b", "<s> a</s> b", "<|system|>\nA<|end|>\n<|user|>\nB<|end|>\n<|assistant|>\n", "<|dummy_86|><|dummy_87|>", "<|reserved_200029|>",
          "<|im_start|>user<|im_sep|>Hi<|im_end|>", "<|im_start|>\n user \n<|im_sep|>\n Hi \n<|im_end|>\n", "<think>\nhm\n</think>\n\n42"]
MESSAGES = {
    "one": [{"role": "user", "content": "What color is the sky?"}],
    "system": [{"role": "system", "content": "System message"}, {"role": "user", "content": "Hello, can you call some tools for me?"},
               {"role": "assistant", "content": "Sure, I can calculate the sum for you!"}],
    "helpful": [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "How should I explain the Internet?"}],
    "knight": [{"role": "system", "content": "You are a medieval knight and must provide explanations to modern people."},
               {"role": "user", "content": "How should I explain the Internet?"}],
    "fruit": [{"role": "system", "content": "You are a helpful digital assistant. Please provide safe, ethical and accurate information to the user."},
              {"role": "user", "content": "Can you provide ways to eat combinations of bananas and dragonfruits?"}],
    "many": [{"role": "user", "content": " spaces \n"}, {"role": "assistant", "content": "日本語 🙂"}, {"role": "user", "content": ""},
             {"role": "assistant", "content": "<|end|>"}, {"role": "user", "content": "<b>&amp;</b> {{ 7*7 }} 'quoted'"}],
    "tools": [{"role": "system", "content": "You are a helpful assistant with some tools.",
               "tools": '[{"name": "get_weather", "parameters": {"city": {"type": "str"}}}]'},
              {"role": "user", "content": "Weather in Paris?"}],
    "tools none": [{"role": "system", "content": "S", "tools": None}, {"role": "user", "content": "U"}],
    "unknown role": [{"role": "tool", "content": "42"}, {"role": "user", "content": "and?"}],
    "empty system": [{"role": "system", "content": ""}, {"role": "user", "content": "x"}],
}


def strings():
    """Return all strings once, in a fixed order."""
    around = [form.format(token) for token in SPECIAL for form in AROUND]
    spaced = [space + "x" for space in SPACES] + ["x" + space for space in SPACES] + ["x" + space + "y" for space in SPACES]
    bytes_ = [bytes([n, 0x80 + n % 64]).decode("utf-8") for n in range(0xC2, 0xE0, 5)]
    decomposed = [unicodedata.normalize("NFD", text) for text in PLAIN if unicodedata.normalize("NFD", text) != text][:8]
    return list(dict.fromkeys([*PLAIN, *SPACES, *spaced, *BROKEN, *around, *bytes_, *decomposed]))


def make_folder(folder, family, name):
    """Put the files of one tokenizer into one folder, with the config.json that makes Transformers take its Phi-3 path."""
    folder.mkdir(parents=True)
    tokenizer, settings = (Path(family) / part for part in FAMILY[name])
    for file in (tokenizer / "tokenizer.json", settings / "tokenizer_config.json", settings / "chat_template.jinja"):
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text('{"model_type": "phi3"}\n')
    return folder
