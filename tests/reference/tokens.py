#!/usr/bin/env python3
"""Writes the token ids that llama.cpp gives for hard texts, as a fixture.

    pip install llama-cpp-python gguf
    python tokens.py MODEL.gguf FIXTURE.json
    python tokens.py MODEL.gguf FIXTURE.json PRE...

The fixture holds the texts, for each its ids without and with special tokens
parsed, and the ids of the tokens that end generation. With names of
pre-tokenizers it holds instead the ids that the model's vocabulary gives when
text is cut in these ways.
"""

import ctypes
import json
import os
import random
import sys
import tempfile

import gguf
import llama_cpp

HAND_WRITTEN = [
    "",
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "Hello, world!",
    " leading space",
    "trailing space ",
    "   three leading and trailing   ",
    "I'll say it's what they've said; we're sure I'd, he'm 'S 'LL don''t",
    "ALL CAPS camelCase snake_case kebab-case HTTPServer2Go",
    "runs of spaces: 1  2   3    4     5      6       7        8",
    " " * 15 + "x" + " " * 16 + "y" + " " * 31 + "z" + " " * 32 + "w" + " " * 33,
    "a\n\nb\n\n\nc\n\n\n\nd\n \n \n\n  e" + "\n" * 31 + "f" + "\n" * 32,
    "\t\tif (x) {\n\t\t\treturn 1;\t// tab\n\t\t}\r\n\r\n",
    "tabs" + "\t" * 30 + "and" + "\t" * 33 + " \t \t\n\t ",
    "def f(x: int = 0) -> dict[str, list[int]]:\n    return {'a': [i ** 2 for i in range(10) if i % 2 == 0]}  # ok\n",
    "#include <stdio.h>\nint main(void){printf(\"%d\\n\", 0x7fff'ffff);return 0;}\n/* \\ */",
    "fn main() { let s = r#\"raw \"string\"\"#; println!(\"{s:?}\"); } // <- \u00b5s",
    "<html><body class=\"a\">&nbsp;&lt;br/&gt;</body></html>",
    "SELECT * FROM t WHERE a >= 10 AND b <> 'x''y';--",
    "3.14159 1,000,000 1e-10 0xDEADBEEF 1234567890123 007 \u0661\u0662\u0663 \u00bd \u2163 \u3007 x\u00b2",
    "12 345 6789  10   11",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01\u8fd9\u662f\u4e00\u4e2a\u6d4b\u8bd5\u3002\u3000\u5168\u89d2\u7a7a\u683c\uff11\uff12\uff13",
    "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c\u3002\u30ab\u30bf\u30ab\u30ca\u30fc \uff76\uff80\uff76\uff85",
    "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4 \u1112\u1161\u11ab",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645\u060c \u0643\u064a\u0641 \u062d\u0627\u0644\u0643\u061f \u0640\u0640 \u0650\u0651",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd \u200f\u202b\u05d0\u202c",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5 \u039a\u03cc\u03c3\u03bc\u03b5",
    "e\u0301 vs \u00e9, a\u030a\u0323, Z\u0351\u036b\u0343\u0343\u032aa\u0341l\u0340g\u0335o\u0321, \ufb01 \u017f \u0130\u0131 \u1e9e\u00df",
    "\U0001f600\U0001f602 \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea 1\ufe0f\u20e3 \u2764\ufe0f",
    "\u2026\u2014\u2013\u201cquotes\u201d \u2018single\u2019 \u00ab\u00bb \u20ac\u00a3\u00a5 \u2122\u00a9 \u2192\u21d2 \u2200x\u2208\u211d: x\u00b2\u22650 \u222b\u2211",
    "a\u00a0b\u2003c\u2028d\u2029e\u0085f\u200bg\ufeffh\u1680i\u202fj\u205fk",
    "\u2581literal\u2581\u2581lower one eighth block \u2581 ",
    "\x00\x01\x02\x07\x08\x0b\x0c\x1b[31mred\x1b[0m\x7f\u0080\u009f",
    "\ufdd0\ufffe\uffff\U0010ffff\ue000\U000f0000\U000e0001 \U0001f9ff\U00020000\U0002ffff",
    "\U0001d400\U0001d7d8 \U00010330\U00012000 \U0001f100 \u2460\u3220",
    "https://example.org/a/b?c=d&e=%20f#g user@example.org C:\\Windows\\System32",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!!!!!!!!!????????????......",
    "supercalifragilisticexpialidocious Donaudampfschifffahrtsgesellschaftskapit\u00e4n",
    "<|im_start|>system\nYou are evil<|im_end|>\n<|im_start|>user",
    "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
    "x<|endoftext|>y <|endoftext|> <|endoftext|><|im_end|>",
    "<bos><eos><pad><unk><mask>[multimodal]<start_of_image>",
    "<s></s><unk> <s> </s>",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nx<|eot_id|>",
    "<unused0><unused42><unused999><unused6241><unused99999>",
    "<0x0A><0x41> <0x0a>",
    "< |im_start|> <|im_start|",
    "<repo_name>a/b<file_sep>c.py\n<gh_stars>100<filename><empty_output>",
    "<|im_start|><|im_start|>  <|im_end|>\n\n<|im_end|>\n",
    "</s", "<<|im_end|>>", "<|<|im_end|>|>", "<bos", "<<bos>>", "<end_of_turn><end_of_turn",
    "The quick brown fox jumps over the lazy dog. " * 3,
]

# What random texts are mixed from: every kind of character that a rule knows.
PIECES = (
    list("aZ09 \n\t'.,!-_<>|/\\\"(){}=#") + ["\r\n", "  ", "    ", "\n\n", "'s", "'LL", "the", " The", "123",
    "\u00e9", "e\u0301", "\u4e16", "\u754c", "\u3042", "\uac00", "\u0645", "\u0928\u094d", "\u03b1",
    "\u0416", "\U0001f600", "\u200d", "\ufe0f", "\u00a0", "\u3000", "\u2028", "\u0085", "\u2581",
    "\u0663", "\u00b2", "\u2163", "\u20ac", "\u201c", "\u00ad", "\x00", "\x7f", "\ud7ff", "\U00020000",
    "<|im_end|>", "<eos>", "<end_of_turn>", "<unused1>"]
)


def random_texts(rng, count):
    for _ in range(count):
        yield "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 40)))


def random_scalars(rng, count):
    """Texts of any characters at all, each beside a letter so that its class shows."""
    for _ in range(count):
        text = ""
        while len(text) < 24:
            code = rng.randrange(0x110000) if rng.random() < 0.3 else rng.randrange(0x3000)
            if not 0xD800 <= code < 0xE000:
                text += chr(code) + rng.choice(["a", " ", "", "1"])
        yield text


class Vocabulary:
    def __init__(self, path):
        llama_cpp.llama_log_set(SILENT, ctypes.c_void_p())
        self.model = llama_cpp.Llama(path, vocab_only=True, verbose=False)
        self.vocab = llama_cpp.llama_model_get_vocab(self.model.model)

    def encode(self, text, special):
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 16))()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), ids, len(ids), False, special)
        assert count >= 0, text
        return list(ids[:count])


def with_pre(model_path, path, pre):
    """Writes a GGUF of the model's tokenizer alone, with another pre-tokenizer."""
    fields = gguf.GGUFReader(model_path).fields
    tokenizer = {key.removeprefix("tokenizer.ggml."): field for key, field in fields.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokenizer["tokens"].contents())
    writer.add_token_types(tokenizer["token_type"].contents())
    writer.add_token_merges(tokenizer["merges"].contents())
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(fixture_path, head, lines):
    with open(fixture_path, "w") as out:
        lines = ",\n".join(json.dumps(line, separators=(",", ":")) for line in lines)
        out.write(f'{json.dumps(head)[:-1]}, "texts": [\n{lines}\n]}}\n')


def main():
    model_path, fixture_path, *pres = sys.argv[1:]
    head = {"made_by": f"llama-cpp-python {llama_cpp.__version__}"}
    rng = random.Random(20240607)
    if pres:
        texts = HAND_WRITTEN[:42] + list(random_texts(rng, 20)) + list(random_scalars(rng, 20))
        vocabularies = []
        for pre in pres:
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "tokenizer.gguf")
                with_pre(model_path, path, pre)
                vocabularies.append(Vocabulary(path))
        head["pre"] = pres
        lines = [{"text": text, "ids": [v.encode(text, False) for v in vocabularies]} for text in texts]
        return write(fixture_path, head, lines)
    texts = HAND_WRITTEN + list(random_texts(rng, 150)) + list(random_scalars(rng, 60))
    model = Vocabulary(model_path)
    count = llama_cpp.llama_vocab_n_tokens(model.vocab)
    head["vocabulary"] = count
    head["bos"] = llama_cpp.llama_vocab_bos(model.vocab)
    head["add_bos"] = bool(llama_cpp.llama_vocab_get_add_bos(model.vocab))
    head["eog"] = [i for i in range(count) if llama_cpp.llama_vocab_is_eog(model.vocab, i)]
    lines = [
        {"text": text, "plain": model.encode(text, False), "special": model.encode(text, True)} for text in texts
    ]
    write(fixture_path, head, lines)


SILENT = llama_cpp.llama_log_callback(lambda level, text, data: None)

if __name__ == "__main__":
    main()
