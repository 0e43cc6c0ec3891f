"""Broken files, settings and disks: each ends with status 1 or 2 and one line that names the thing.

    python checks/bad_inputs.py

The full-disk cases mount a small tmpfs and are skipped where that is not allowed.
"""

import json
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import torch
from common import CONFIGS, Report, engobe, make_model, make_rows
from gguf import GGUFWriter
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

report = Report()


def fails(name, args, *parts, status=(1, 2)):
    """engobe must fail with one line that has all parts."""
    done = engobe(*args, ok=False)
    lines = [l for l in done.stderr.splitlines() if l.startswith("engobe:")]
    last = lines[-1] if lines else done.stderr[-300:]
    good = (
        done.returncode in status
        and len(lines) == 1
        and "mistake of ours" not in done.stderr
        and all(p in last for p in map(str, parts))
    )
    report.true(name, good, f"[{done.returncode}] {last[:260]}" if not good else "")
    return last


def copy(model, to, **config):
    shutil.copytree(model, to)
    if config:
        path = to / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return to


def tiny_gguf(path, arch="llama"):
    w = GGUFWriter(str(path), arch)
    w.add_block_count(1)
    w.add_embedding_length(32)
    w.add_feed_forward_length(64)
    w.add_head_count(2)
    w.add_head_count_kv(2)
    w.add_context_length(64)
    w.add_layer_norm_rms_eps(1e-5)
    import numpy as np

    rng = np.random.default_rng(0)
    t = lambda name, *shape: w.add_tensor(name, rng.standard_normal(shape).astype(np.float32) * 0.1)
    t("token_embd.weight", 48, 32)
    t("output_norm.weight", 32)
    for n in ("attn_q", "attn_k", "attn_v", "attn_output"):
        t(f"blk.0.{n}.weight", 32, 32)
    t("blk.0.ffn_gate.weight", 64, 32)
    t("blk.0.ffn_up.weight", 64, 32)
    t("blk.0.ffn_down.weight", 32, 64)
    t("blk.0.attn_norm.weight", 32)
    t("blk.0.ffn_norm.weight", 32)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def models(work, rows):
    model = work / "model"
    ev = lambda m: ["eval", "--model", m, "--data", rows]
    fails("no such model", ev(work / "nowhere"), "nowhere")
    fails("empty directory", ev(Path(tempfile.mkdtemp(dir=work))), "safetensors")
    bad = copy(model, work / "cut")
    data = (bad / "model.safetensors").read_bytes()
    for i, cut in enumerate((0, 5, 100, len(data) // 2, len(data) - 1)):
        (bad / "model.safetensors").write_bytes(data[:cut])
        fails(f"safetensors cut at {cut}", ev(bad), "model.safetensors")
    (bad / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + data[8:])
    fails("header of 2^60 bytes", ev(bad), "model.safetensors")
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}).encode()
    (bad / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"0000")
    fails("shape that overflows", ev(bad), "model.safetensors", "overflow")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: torch.zeros(3, 5)}, bad / "model.safetensors")
    fails("wrong shape", ev(bad), name, "[3, 5]")
    save_file({k: v for k, v in tensors.items() if k != name}, bad / "model.safetensors")
    fails("missing tensor", ev(bad), name)
    nan = tensors[name].clone()
    nan[0, 0] = float("nan")
    save_file({**tensors, name: nan}, bad / "model.safetensors")
    fails("NaN weight", ev(bad), name, "NaN")
    fails("unknown architecture", ev(copy(model, work / "arch", model_type="mamba")), "mamba", "config.json")
    fails("heads that do not divide", ev(copy(model, work / "heads", num_key_value_heads=3)), "num_key_value_heads")
    fails("no hidden_size", ev(copy(model, work / "hs", hidden_size=None)), "hidden_size")
    fails("odd rope", ev(copy(model, work / "rope", rope_scaling={"rope_type": "spiral"}, rope_parameters=None)), "spiral")
    broken = copy(model, work / "json")
    (broken / "config.json").write_text('{"model_type": "llama",')
    fails("broken config.json", ev(broken), "config.json")
    good = tiny_gguf(work / "good.gguf")
    ok = engobe("eval", "--model", good, "--data", work / "gguf-rows.jsonl")
    report.true("a good GGUF is good", ok["rows"] == 2)
    data = good.read_bytes()
    for cut in (0, 3, 20, 200, len(data) // 2, len(data) - 1):
        bad = work / f"cut{cut}.gguf"
        bad.write_bytes(data[:cut])
        fails(f"GGUF cut at {cut}", ev(bad), bad.name)
    bad = work / "huge.gguf"
    bad.write_bytes(data[:8] + struct.pack("<QQ", 2**60, 2**60) + data[24:])
    fails("GGUF that claims 2^60 tensors", ev(bad), "huge.gguf")
    fails("GGUF of another architecture", ev(tiny_gguf(work / "arch.gguf", "falcon")), "falcon")


def adapters(work, rows):
    model = work / "model"
    ev = lambda a: ["eval", "--model", model, "--adapter", a, "--data", rows]
    fails("no such adapter", ev(work / "nowhere"), "nowhere")
    other = make_model(work / "other", 3, **{**CONFIGS["plain"], "hidden_size": 32})
    peft = get_peft_model(other, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    peft.save_pretrained(work / "other-adapter")
    fails("adapter for another model", ev(work / "other-adapter"), "does not fit", "q_proj")
    good = work / "adapter"
    engobe("train", "--model", model, "--data", rows, "--out", good, "--max-steps", 1, "--allow", "eot-never-label")
    tensors = load_file(good / "adapter_model.safetensors")

    def changed(name, tensors=tensors, **config):
        to = copy(good, work / name)
        save_file(tensors, to / "adapter_model.safetensors")
        path = to / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return to

    first = sorted(tensors)[0]
    fails("an extra tensor", ev(changed("extra", {**tensors, "base_model.model.x.lora_A.weight": torch.zeros(2, 2)})), "x.lora_A")
    fails("a missing tensor", ev(changed("less", {k: v for k, v in tensors.items() if k != first})), first)
    fails("NaN in an adapter", ev(changed("nan", {**tensors, first: tensors[first] * float("nan")})), first)
    fails("adapter r 0", ev(changed("r0", r=0)), "adapter_config.json", "r")
    fails("adapter r -1", ev(changed("r-1", r=-1)), "adapter_config.json", "r")
    fails("another peft_type", ev(changed("type", peft_type="VERA")), "VERA")
    fails("DoRA is not here yet", ev(changed("dora", use_dora=True)), "use_dora")
    cut = changed("cut-adapter")
    data = (cut / "adapter_model.safetensors").read_bytes()
    (cut / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])
    fails("adapter cut", ev(cut), "adapter_model.safetensors")
    (cut / "adapter_config.json").write_text("{")
    fails("adapter config broken", ev(cut), "adapter_config.json")


def data(work, rows):
    model = work / "model"
    train = lambda p: ["train", "--model", model, "--data", p, "--out", work / "o", "--max-steps", 1]

    def file(name, text):
        (work / name).write_text(text)
        return work / name

    fails("no such data", train(work / "nowhere.jsonl"), "nowhere.jsonl")
    fails("empty data", train(file("empty.jsonl", "")), "empty.jsonl")
    lines = [json.dumps({"input_ids": [1, 2, 3]}) for _ in range(5)]
    fails("invalid JSON on line 3", train(file("json.jsonl", "\n".join(lines[:2] + ["{oops"] + lines[2:]))), "json.jsonl", "line 3")
    fails("id beyond the vocabulary", train(file("ids.jsonl", '{"input_ids": [1, 2, 999999]}')), "999999", "line 1")
    fails("labels of another length", train(file("len.jsonl", '{"input_ids": [1, 2], "labels": [1]}')), "line 1")
    fails("text without a tokenizer", train(file("text.jsonl", '{"text": "hello"}')), "tokenizer")
    fails("all masked", train(file("mask.jsonl", '{"input_ids": [1, 2], "labels": [-100, -100]}')), "all-masked-rows")
    fails("unknown columns", train(file("cols.jsonl", '{"foo": 1}')), "foo")
    smol = Path(engobe("fetch", "smollm2-135m")["path"])
    row = file("roles.jsonl", json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}))
    merged = work / "raising"
    adapter = work / "smol-adapter"
    engobe("train", "--model", smol, "--data", row, "--out", adapter, "--max-steps", 1, "--r", 1, "--target-modules", "q_proj")
    engobe("merge", "--model", smol, "--adapter", adapter, "--out", merged, "--dtype", "bf16")
    (merged / "chat_template.jinja").write_text("{{ raise_exception('no roles like that') }}")
    fails("a template that raises", ["lint", "--model", merged, "--data", row], "no roles like that")
    (merged / "chat_template.jinja").write_text("{% if %}")
    fails("a template that does not compile", ["lint", "--model", merged, "--data", row], "template")
    (merged / "tokenizer.json").write_text("{}")
    fails("a broken tokenizer", ["lint", "--model", merged, "--data", row], "tokenizer.json")


def settings(work, rows):
    model = work / "model"
    base = ["train", "--model", model, "--data", rows, "--out", work / "s", "--max-steps", 1, "--allow", "eot-never-label"]
    fails("negative rank", base + ["--r", "-4"], "r", "-4")
    fails("rank 0", base + ["--r", "0"], "r")
    fails("alpha 0", base + ["--lora-alpha", "0"], "lora_alpha")
    fails("unknown flag", base + ["--lerning-rate", "1"], "--learning-rate", status=(2,))
    fails("unknown command", ["trian"], "train", status=(2,))
    fails("unknown setting", base + ["--set", "lora_aplha=3"], "lora_alpha")
    (work / "run.toml").write_text("r = 4\nbatchsize = 3\n")
    fails("unknown key in a file", base + ["--config", work / "run.toml"], "run.toml", "batch_size", "line 2")
    (work / "run.toml").write_text("r = \n")
    fails("broken file", base + ["--config", work / "run.toml"], "run.toml", "line 1")
    fails("no such target", base + ["--target-modules", "query"], "query", "q_proj")
    fails("a broken regex", base + ["--target-modules", "(q_proj"], "(q_proj")
    fails("no steps", base[:-4] + ["--max-steps", "0", "--allow", "eot-never-label"], "max_steps")
    fails("no batch", base + ["--batch-size", "0"], "batch_size")
    fails("a learning rate that is none", base + ["--learning-rate", "nan"], "learning_rate")
    fails("dropout of 1", base + ["--lora-dropout", "1.5"], "lora_dropout")
    fails("a dtype that is none", base + ["--dtype", "int3"], "int3")
    fails("a device that is none", base + ["--device", "tpu"], "tpu")
    fails("no prompt", ["generate", "--model", model], "--prompt", status=(2,))
    fails("id out of range", ["generate", "--model", model, "--prompt-ids", "1,99999"], "99999")
    fails("negative temperature", ["generate", "--model", model, "--prompt-ids", "1", "--temperature", "-1"], "temperature")
    fails("text without tokenizer", ["generate", "--model", model, "--prompt", "hi"], "tokenizer")
    engobe(*base)
    before = (work / "s" / "adapter_model.safetensors").read_bytes()
    fails("a directory that holds a run", base, "--resume")
    fails("resuming with other settings", base + ["--resume", "--r", "2"], "r = ")
    report.true("nothing was overwritten", before == (work / "s" / "adapter_model.safetensors").read_bytes())
    fails("merge into a full directory", ["merge", "--model", model, "--adapter", work / "s", "--out", work / "s"], "not empty")
    fails("out is a file", base[:5] + ["--out", rows, "--max-steps", "1"], rows)


def full_disk(work, rows):
    disk = work / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode:
        print("skip full disk: tmpfs cannot be mounted here")
        return
    try:
        train = ["train", "--model", work / "model", "--data", rows, "--out", disk / "out", "--allow", "eot-never-label"]
        engobe(*train, "--max-steps", 1, "--r", 1, "--target-modules", "q_proj")
        before = (disk / "out" / "adapter_model.safetensors").read_bytes()
        fails("full disk while training", train[:-3] + [disk / "out2", "--allow", "eot-never-label", "--max-steps", "3", "--r", "64"], "disk")
        left = [p.name for p in disk.rglob("*partial*")]
        report.true("no half files", not left, str(left))
        report.true("the first run is untouched", before == (disk / "out" / "adapter_model.safetensors").read_bytes())
        fails("full disk while merging", ["merge", "--model", work / "model", "--adapter", disk / "out", "--out", disk / "merged"], "disk")
        report.true("nothing is left of it", not (disk / "merged").exists())
    finally:
        subprocess.run(["umount", disk])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        make_model(work / "model", 1, **CONFIGS["plain"])
        make_rows(work / "rows.jsonl", 1, 12)
        make_rows(work / "gguf-rows.jsonl", 1, 2, vocab=48)
        for part in (models, adapters, data, settings, full_disk):
            part(work, work / "rows.jsonl")
    report.exit()
