"""Texts, pairs and words as transformers' fast tokenizers encode them for encoders: special tokens, types, cuts, words.
For T5 texts and pairs alone.

    pip install -r golden/requirements.txt && python golden/task_rows.py [NAME ...]

Writes crates/data/tests/golden/tasks/{bert,roberta,deberta,t5}/: a tiny tokenizer of each kind, and cases.json.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import DebertaV2Tokenizer, PreTrainedTokenizerFast

OUT = Path(__file__).resolve().parent.parent / "crates/data/tests/golden/tasks"
TEXT = [
    "The cat sat on the mat, and the dog didn't care.",
    "A stirring, funny and finally transporting re-imagining of beauty and the beast",
    "One long string of clichés; nothing new under the sun!",
    "Jim Henson was a puppeteer from Mississippi in the U.S.A.",
]
PAIRS = [("the cat", "a dog"), (TEXT[0], TEXT[1]), (TEXT[3], "no"), ("no", TEXT[3]), ("", "the"), (TEXT[1], "")]
WORDS = [["Jim", "Henson", "was", "a", "puppeteer", "."], ["clichés", "U.S.A.", "don't"], ["sun"], ["", "cat"], ["\u00a0", "mat"]]
LENGTHS = [64, 16, 9, 8]


def bert():
    t = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    t.normalizer = normalizers.BertNormalizer(lowercase=True)
    t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    t.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
    sep, cls = t.token_to_id("[SEP]"), t.token_to_id("[CLS]")
    t.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", cls), ("[SEP]", sep)])
    t.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=t, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]",
                                   mask_token="[MASK]", model_input_names=["input_ids", "token_type_ids", "attention_mask"])


def roberta():
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
                                                    initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    t.post_processor = processors.RobertaProcessing(("</s>", t.token_to_id("</s>")), ("<s>", t.token_to_id("<s>")), add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=t, cls_token="<s>", sep_token="</s>", pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def t5():
    t = Tokenizer(models.Unigram())
    t.normalizer = normalizers.NFKC()
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    t.train_from_iterator(TEXT, trainers.UnigramTrainer(vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"))
    t.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", t.token_to_id("</s>"))])
    t.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=t, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_input_names=["input_ids", "attention_mask"])


def charsmap():
    """SentencePiece's compiled normalization of a few characters; a released model's own has 240 KB."""
    with tempfile.TemporaryDirectory() as folder:
        rules = Path(folder) / "rules.tsv"
        rules.write_text("FB01\t66 69\nBD\t31 2F 32\n201C\t22\nA0\t20\n")
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXT), model_prefix=f"{folder}/m", vocab_size=60, model_type="unigram",
                                                 normalization_rule_tsv=str(rules), minloglevel=2)
        proto = sentencepiece_model_pb2.ModelProto.FromString((Path(folder) / "m.model").read_bytes())
    return proto.normalizer_spec.precompiled_charsmap


def deberta():
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    t = Tokenizer(models.Unigram())
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    t.train_from_iterator(TEXT, trainers.UnigramTrainer(vocab_size=110, special_tokens=special, unk_token="[UNK]"))
    vocab = [tuple(piece) for piece in json.loads(t.to_str())["model"]["vocab"]]
    made = DebertaV2Tokenizer(vocab=vocab, unk_id=3)
    # as in microsoft/deberta-v3-base's tokenizer.json
    made.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Strip(), normalizers.Precompiled(charsmap()), normalizers.Replace(Regex(" {2,}"), " ")])
    return made


def words_of(tokenizer, words, length, spaced):
    # RoBERTa's tokenizer is used with add_prefix_space=True for words
    given = [w if w.startswith(" ") else " " + w for w in words] if spaced else words
    e = tokenizer(given, is_split_into_words=True, truncation=True, max_length=length)
    ids = e.word_ids()
    return {"words": words, "max": length, "ids": e["input_ids"], "first": [ids.index(i) if i in ids else None for i in range(len(words))]}


def main(wanted):
    for name, make in {"bert": bert, "roberta": roberta, "deberta": deberta, "t5": t5}.items():
        if wanted and name not in wanted:
            continue
        shutil.rmtree(OUT / name, ignore_errors=True)
        tokenizer = make()
        tokenizer.save_pretrained(OUT / name)
        texts = []
        for text, pair in [(t, None) for t in TEXT + ["", "ﬁne  ½ “a\u00a0b\n c"]] + PAIRS:
            for length in LENGTHS:
                # as a batch: a single call takes an empty second text for none
                e = tokenizer([text], [pair] if pair is not None else None, truncation="longest_first", max_length=length)
                types = e.get("token_type_ids")
                texts.append({"text": text, "pair": pair, "max": length, "ids": e["input_ids"][0], "types": types and types[0]})
        words = [words_of(tokenizer, w, length, name == "roberta") for w in WORDS for length in LENGTHS if name != "t5"]
        (OUT / name / "cases.json").write_text(json.dumps({"texts": texts, "words": words}, separators=(",", ":")))


if __name__ == "__main__":
    main(sys.argv[1:])
