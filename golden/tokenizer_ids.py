"""Golden token ids for crates/data: tiny tokenizers, their GGUF metadata, and the ids that llama.cpp and
Hugging Face's tokenizers give.

    pip install tokenizers==0.23.3 transformers==5.23.0 sentencepiece==0.2.3 gguf==0.19.0 numpy==2.4.6 \
        xllamacpp==2026.10.11549
    python golden/tokenizer_ids.py crates/data/tests/golden [SmolLM2.gguf]

Writes tokenizers.json (metadata and ids; every id list was given by both) and hf/ (a Hugging Face directory with a
chat template, with masks.json of transformers). With a SmolLM2 GGUF also smollm2.json: llama.cpp's ids for it.
"""

import json
import sys
import tempfile
import urllib.request
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
import xllamacpp
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import generate_merges

CORPUS = """\
The quick brown fox jumps over the lazy dog. The dog doesn't mind; it's a lazy dog, they've all seen it.
def main(args: list[str]) -> int:\n    for i in range(100):\n        print(f"{i}: {args[i]}")\n    return 0
In 1984, 3.14159 and 2,718,281 were numbers. I'LL SAY IT LOUD. Hello world, hello World!
我们在学习语言模型。你好，世界！今天天气很好。 Ελληνικά και русский текст. Ça va bien, déjà vu, naïve café.
<html><body class="x">a &amp; b</body></html> {"key": [1, 2, 3], "other": null}\n\n\n\tTabs and  double  spaces   end
""" * 4

TEXTS = [
    "", " ", "  ", "a", "Hello world", " Hello", "Hello ", "  Hello   world  ", "\n", "\n\n\n", "a\nb\n\nc", "\r\n x\r\n",
    "def f(x):\n    return x  # twice\n\t\tif a:\n", "12345 1 22 333 4444 3.14159 1,000,000", "1234567", "x=1;y=22",
    "I'll we'RE THEY'VE don't 'Sup 's", "🦙", "hi 🦙🦙 there 👩‍🚀", "你好，世界！今天", "日本語テキスト",
    "naïve café e\u0301 ﬁ ½ Ⅷ ²", "русский Ελληνικά", "\t\ttabs\t", "a\u00a0b\u3000c\u200bd", "!!!??? ...--- ==> $x^2$ `code` ~|~",
    "<|im_start|>user\nHi<|im_end|>\n", "a<|im_end|> b <|im_end|>", "<|im_end", "<tool> x<tool>y", "x <|endoftext|>",
    "CamelCaseWORDS andMore HTMLParser", "end of text   ", "http://a.b/c?d=e&f#g/\n", "   \n  \n x", "ไทย हिन्दी عربى",
]

# Regexes of the models' own tokenizer.json; None is ByteLevel's
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(regex):
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


PRE = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "llama-bpe": split(LLAMA3),
    "qwen2": split(QWEN2),
    "tekken": split(TEKKEN),
    # no Hugging Face counterpart: llama.cpp's own fallback
    "default": None,
    "falcon": None,
    "gpt-4o": None,
}
IGNORE_MERGES = {"llama-bpe", "tekken"}
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def train_byte_level():
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=CONTROL, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tok.train_from_iterator(CORPUS.split("\n"), trainer)
    model = json.loads(tok.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    # a token that no merge leads to: only ignore_merges finds it
    tokens += ["ĠHTMLParser", "<tool>"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    types = [3 if t in CONTROL else 4 if t == "<tool>" else 1 for t in tokens]
    return {"model": "gpt2", "tokens": tokens, "token_types": types, "merges": merges, "bos": 0, "eos": 2}


def hf_byte_level(meta, pre):
    merges = [tuple(m.split(" ")) for m in meta["merges"]]
    vocab = {t: i for i, t in enumerate(meta["tokens"])}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in IGNORE_MERGES))
    tok.pre_tokenizer = PRE[pre]
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL])
    tok.add_tokens([AddedToken("<tool>", normalized=False)])
    return tok


def train_spm(folder):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in CORPUS.split("\n") if line]), model_prefix=str(folder / "spm"),
        vocab_size=500, model_type="bpe", byte_fallback=True, character_coverage=0.98, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        user_defined_symbols=["<tool>"], control_symbols=["<|im_start|>", "<|im_end|>"], minloglevel=2,
    )
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    ids = range(sp.get_piece_size())
    types = [2 if sp.is_unknown(i) else 6 if sp.is_byte(i) else 3 if sp.is_control(i) else 1 for i in ids]
    tokens = [sp.id_to_piece(i) for i in ids]
    types[tokens.index("<tool>")] = 4
    scores = [sp.get_score(i) for i in ids]
    return {"model": "llama", "tokens": tokens, "token_types": types, "scores": scores, "bos": 1, "eos": 2, "unk": 0}


def hf_spm(meta):
    vocab = {t: i for i, t in enumerate(meta["tokens"])}
    merges = generate_merges(vocab, dict(zip(meta["tokens"], meta["scores"])))
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = [t for t, k in zip(meta["tokens"], meta["token_types"]) if k in (2, 3)]
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tok.add_tokens([AddedToken("<tool>", normalized=False)])
    return tok


def write_gguf(path, meta, pre):
    """A model of one tiny layer around the vocabulary: the server of llama.cpp loads nothing less."""
    w = gguf.GGUFWriter(path, "llama")
    d, n = 32, len(meta["tokens"])
    for key, value in (("block_count", 1), ("context_length", 64), ("embedding_length", d), ("feed_forward_length", d)):
        getattr(w, "add_" + key)(value)
    w.add_head_count(1)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_tokenizer_model(meta["model"])
    if pre:
        w.add_tokenizer_pre(pre)
    w.add_token_list(meta["tokens"])
    w.add_token_types(meta["token_types"])
    if "merges" in meta:
        w.add_token_merges(meta["merges"])
    if "scores" in meta:
        w.add_token_scores(meta["scores"])
    w.add_bos_token_id(meta["bos"])
    w.add_eos_token_id(meta["eos"])
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (n, d), "output_norm": (d,), "blk.0.attn_norm": (d,), "blk.0.ffn_norm": (d,)}
    shapes |= {f"blk.0.{k}": (d, d) for k in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    for name, shape in shapes.items():
        w.add_tensor(name + ".weight", rng.normal(size=shape).astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def llama_cpp(path, texts):
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel = 64, 1
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)

    def tokenize(text, special):
        body = json.dumps({"content": text, "add_special": special, "parse_special": True}).encode()
        request = urllib.request.Request(server.listening_address + "/tokenize", body, {"Content-Type": "application/json"})
        return json.loads(urllib.request.urlopen(request).read())["tokens"]

    return [tokenize(t, False) for t in texts], tokenize("a", True)


CHAT = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
CHATS = [
    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": " world \n"}],
    [{"role": "system", "content": "x"}, {"role": "user", "content": "hi 🦙"}, {"role": "assistant", "content": "🦙 12 你好"},
     {"role": "user", "content": ""}, {"role": "assistant", "content": "   "}],
]


def write_hf(folder, meta):
    """A directory as transformers saves it, with BOS added by a post-processor that also trims offsets."""
    tok = hf_byte_level(meta, "llama-bpe")
    template = processors.TemplateProcessing(single="<|endoftext|> $A", pair="$A $B", special_tokens=[("<|endoftext|>", 0)])
    tok.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    tok.enable_truncation(5)
    folder.mkdir(exist_ok=True)
    tok.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
        "chat_template": [{"name": "default", "template": CHAT}, {"name": "tool_use", "template": "tools!"}],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    hf = AutoTokenizer.from_pretrained(folder)
    # trimmed offsets make transformers lose the mask of turns that begin or end with whitespace
    hf.backend_tokenizer.post_processor = template
    masks = []
    for chat in CHATS:
        out = hf.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, max_length=9999)
        masks.append({"messages": chat, "ids": out["input_ids"], "mask": out["assistant_masks"]})
    plain = [{"text": t, "ids": hf(t)["input_ids"], "decoded": hf.decode(hf(t)["input_ids"], skip_special_tokens=True)} for t in TEXTS]
    (folder / "golden.json").write_text(json.dumps({"chats": masks, "plain": plain}, ensure_ascii=False))


def main(out, smollm2=None):
    out = Path(out)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        byte_level, spm = train_byte_level(), train_spm(folder)
        runs = []
        for meta, pre in [(byte_level, pre) for pre in PRE] + [(spm, None)]:
            write_gguf(folder / "m.gguf", meta, pre)
            ids, special = llama_cpp(folder / "m.gguf", TEXTS)
            if pre is None or PRE[pre]:
                hf = hf_byte_level(meta, pre) if pre else hf_spm(meta)
                for text, mine in zip(TEXTS, ids):
                    theirs = hf.encode(text, add_special_tokens=False).ids
                    if mine != theirs:
                        print(f"{pre} {text!r}: llama.cpp {mine}, tokenizers {theirs}", file=sys.stderr)
            runs.append({"model": meta["model"], "pre": pre, "ids": ids, "a_with_special": special})
    golden = {"texts": TEXTS, "vocabularies": [byte_level, spm], "runs": runs}
    (out / "tokenizers.json").write_text(json.dumps(golden, ensure_ascii=False), encoding="utf-8")
    write_hf(out / "hf", byte_level)
    if smollm2:
        ids, special = llama_cpp(smollm2, TEXTS)
        (out / "smollm2.json").write_text(json.dumps({"texts": TEXTS, "ids": ids, "a_with_special": special}, ensure_ascii=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
