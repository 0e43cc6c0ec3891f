"""Bottleneck adapters of AdapterHub's `adapters` on tiny models: logits, and curves of 20 steps.

    pip install --target DIR --no-deps adapters==1.3.0 transformers==4.57.6 "tokenizers<0.23" "huggingface_hub<1"
    PYTHONPATH=DIR python golden/bottleneck.py [NAME...]

(the package wants an older transformers than the other scripts). Writes golden/bottleneck/NAME/: the adapter that
training starts from, as the package saves it, and expected.json. The models are those of golden/llama. Those with a task's
head, over golden/encoders and golden/llama, go to golden/peft_tasks/. Over golden/t5 no adapter is stored: golden/matrix/
t5_*_bottleneck.json are as golden/matrix.py makes its files, and so are their steps.
"""

import shutil
import sys

import adapters
import torch
from adapters import DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
from curves import expect, read_rows, train
from shared import HERE, filled, seq2seq_rows, write_rounded
from transformers import LlamaForCausalLM, T5ForConditionalGeneration

CASES = {
    "pfeiffer": ("gqa_tied", 1, SeqBnConfig(reduction_factor=4)),
    "houlsby": ("gqa_tied", 4, DoubleSeqBnConfig(reduction_factor=8, leave_out=[0])),
    "parallel": ("head_dim_bias", 1, ParBnConfig(reduction_factor={"0": 4, "default": 2}, scaling=2.0)),
    "after_attention": (
        "plain",
        1,
        SeqBnConfig(
            mh_adapter=True,
            output_adapter=False,
            original_ln_before=False,
            residual_before_ln=False,
            non_linearity="tanh",
            reduction_factor=5,
        ),
    ),
    "learned": (
        "gqa_tied",
        1,
        DoubleSeqBnConfig(scaling="learned", ln_after=True, adapter_residual_before_ln=True, reduction_factor=6),
    ),
    "channel": ("plain", 4, ParBnConfig(scaling="channel", ln_after=True, reduction_factor=4)),
    "late_residual": (
        "gqa_tied",
        4,
        SeqBnConfig(residual_before_ln=False, original_ln_after=False, non_linearity="gelu", scaling=0.5),
    ),
}

# with a head: base, problem, classes as in peft_tasks.py
TASKS = {
    "bert_houlsby": ("bert", "single_label_classification", 3, DoubleSeqBnConfig(reduction_factor=8)),
    "bert_pfeiffer": ("bert", "tokens", 3, SeqBnConfig(reduction_factor=4)),
    "roberta_parallel": ("roberta", "regression", 1, ParBnConfig(reduction_factor=4)),
    "distilbert_houlsby": ("distilbert", "multi_label_classification", 3, DoubleSeqBnConfig(reduction_factor=8)),
    "llama_pfeiffer": ("llama/gqa_tied", "single_label_classification", 3, SeqBnConfig(reduction_factor=4)),
    "bert_parallel": ("bert", "single_label_classification", 3, ParBnConfig(reduction_factor=8)),
    "roberta_houlsby": ("roberta", "single_label_classification", 3, DoubleSeqBnConfig(reduction_factor=8)),
    "roberta_pfeiffer": ("roberta", "tokens", 3, SeqBnConfig(reduction_factor=8)),
    "distilbert_pfeiffer": ("distilbert", "single_label_classification", 3, SeqBnConfig(reduction_factor=8)),
    "distilbert_parallel": ("distilbert", "tokens", 3, ParBnConfig(reduction_factor=8)),
    "deberta_houlsby": ("deberta_v2_conv_task", "single_label_classification", 3, DoubleSeqBnConfig(reduction_factor=8)),
    "deberta_pfeiffer": ("deberta_v3", "tokens", 3, SeqBnConfig(reduction_factor=8)),
    "deberta_parallel": ("deberta_v2_conv_task", "regression", 1, ParBnConfig(reduction_factor=8)),
    # heads of the package's own models
    "bert_flex": ("bert", "single_label_classification", 3, SeqBnConfig(reduction_factor=8)),
    "roberta_flex": ("roberta", "single_label_classification", 3, SeqBnConfig(reduction_factor=16)),
    "distilbert_flex_tokens": ("distilbert", "tokens", 3, SeqBnConfig(reduction_factor=16)),
}

# of encoder-decoders: attention to the encoder as well, and layers of both sides, which are counted through
T5 = {
    "pfeiffer": SeqBnConfig(reduction_factor=4),
    "houlsby": DoubleSeqBnConfig(reduction_factor={"0": 4, "2": 16, "default": 8}),
    "cross": DoubleSeqBnConfig(reduction_factor=8, cross_adapter=True, leave_out=[1, 2]),
    "parallel": ParBnConfig(reduction_factor=4),
}


def flexible(model, base, tokens):
    """The package's own model over a base, with its usual head."""
    model = adapters.AutoAdapterModel.from_pretrained(HERE.parent / base, config=model.config)
    add = model.add_tagging_head if tokens else model.add_classification_head
    add("task", num_labels=model.config.num_labels)
    return model


def with_head(name, config):
    def adapt(model, directory, base):
        flex = "_flex" in name
        if flex:
            model = flexible(model, base, name.endswith("_tokens"))
        else:
            adapters.init(model)
        model.add_adapter("task", config=config)
        model.train_adapter("task")
        head = [p for n, p in model.named_parameters() if not n.startswith(model.base_model_prefix)]
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.1)
        assert all(p.requires_grad for p in head)
        directory.mkdir(parents=True)
        model.save_adapter(str(directory), "task", use_safetensors=True)
        kept = ["adapter_config.json", "adapter.safetensors", "model_head.safetensors", *(["head_config.json"] if flex else [])]
        for path in directory.iterdir():
            if path.name not in kept:
                path.unlink()
            elif path.suffix == ".json":
                path.write_text(path.read_text().replace(f"{HERE.parent}/", ""))
        return model, 0

    return adapt


def tasks(wanted):
    from peft_tasks import record

    for seed, (name, (*case, config)) in enumerate(TASKS.items(), start=100):
        if wanted and name not in wanted:
            continue
        record(name, seed, case, with_head(name, config))


def encoder_decoders(wanted):
    for base in ("v10", "v11", "uneven"):
        if wanted and f"t5_{base}" not in wanted:
            continue
        rows, methods = seq2seq_rows(f"t5/{base}"), {}
        for name, config in T5.items():
            model = T5ForConditionalGeneration.from_pretrained(HERE / "t5" / base, dtype=torch.float32)
            adapters.init(model)
            model.add_adapter("task", config=config)
            model.train_adapter("task")
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            with torch.no_grad():
                for key, p in trained.items():
                    p.copy_(filled(key, p))
            curve = train(model.double().eval(), rows, 1, steps=10, rate=1e-3)
            methods[name] = {
                "config": {"peft_type": "BOTTLENECK", "adapter_name": "task", **config.to_dict()},
                "trainable_parameters": sum(p.numel() for p in trained.values()),
                "losses": [loss for loss, _ in curve],
                "grad_norms": [norm for _, norm in curve],
            }
        write_rounded(HERE / "matrix" / f"t5_{base}_bottleneck.json", {"base": f"t5/{base}", "learning_rate": 1e-3, "methods": methods})


def main(wanted):
    out = HERE / "bottleneck"
    rows = read_rows()
    for seed, (name, (base, accumulation, config)) in enumerate(CASES.items()):
        if wanted and name not in wanted:
            continue
        shutil.rmtree(out / name, ignore_errors=True)
        torch.manual_seed(seed)
        model = LlamaForCausalLM.from_pretrained(HERE / "llama" / base, dtype=torch.float32)
        adapters.init(model)
        model.add_adapter("task", config=config)
        model.train_adapter("task")  # which activates it, too
        model.eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.1)
        (out / name).mkdir(parents=True)
        model.save_adapter(str(out / name), "task", use_safetensors=True)
        for extra in (out / name).iterdir():
            if extra.name not in ("adapter_config.json", "adapter.safetensors"):
                extra.unlink()
        path = out / name / "adapter_config.json"
        path.write_text(path.read_text().replace(f"{HERE.parent}/", ""))
        expect(model, base, accumulation, rows, out / name / "expected.json")
    tasks(wanted)
    encoder_decoders(wanted)


if __name__ == "__main__":
    main(sys.argv[1:])
