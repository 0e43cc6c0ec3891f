"""Training curves of PEFT's methods for tasks with a head (SEQ_CLS, TOKEN_CLS), over the tiny models of golden/.

    pip install -r golden/requirements.txt && python golden/peft_tasks.py [NAME ...]

Writes golden/peft_tasks/NAME/: the adapter that training starts from; encoder.safetensors, what of a prompt's encoder a file
of PEFT's leaves out; expected.json with rows, logits before the first step, losses and gradient norms. Dropout is off: its
random numbers are torch's own.
"""

import json
import random
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from shared import save_adapter, write_rounded
from tiny import padded, token_rows
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification
from virtual_tokens import hidden_state

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "checks"))
from parity import perturb  # noqa: E402
from peft import (  # noqa: E402
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)

STEPS, BATCH, LR = 10, 4, 1e-3
OFF = {"bert": ["hidden_dropout_prob", "attention_probs_dropout_prob"], "roberta": ["hidden_dropout_prob", "attention_probs_dropout_prob"],
       "distilbert": ["dropout", "attention_dropout", "seq_classif_dropout"], "modernbert": ["classifier_dropout"],
       "electra": ["hidden_dropout_prob", "attention_probs_dropout_prob"], "deberta-v2": ["hidden_dropout_prob", "attention_probs_dropout_prob"]}
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
# PEFT does not read DistilBERT's names of them
DISTILBERT = {"token_dim": 32, "num_attention_heads": 4, "num_layers": 2}
# PEFT saves the classifier alone: ModernBERT's head.dense must be the base's own
# name -> base, problem, classes (0: of tokens), PEFT's configuration and its settings (LoRA's alone if there is no class)
CASES = {
    "bert_single": ("bert", SINGLE, 3, {}),
    "bert_multi": ("bert", MULTI, 4, {"target_modules": "all-linear"}),
    "bert_regression": ("bert_relu_task", REGRESSION, 1, {"target_modules": ["query", "key", "dense"]}),
    "bert_tokens": ("bert", "tokens", 5, {"target_modules": ["query", "value", "intermediate.dense"]}),
    "roberta_single": ("roberta", SINGLE, 2, {"target_modules": ["query", "value"]}),
    "distilbert_single": ("distilbert", SINGLE, 2, {"target_modules": ["q_lin", "v_lin"]}),
    "distilbert_tokens": ("distilbert", "tokens", 3, {"target_modules": ["q_lin", "lin1"]}),
    "deberta_single": ("deberta_v2_conv_task", SINGLE, 3, {"target_modules": ["query_proj", "key_proj", "value_proj", "dense"]}),
    "deberta_tokens": ("deberta_v3", "tokens", 4, {"target_modules": ["query_proj", "key_proj", "value_proj", "dense"]}),
    "modernbert_single": ("modernbert_bias_task", SINGLE, 3, {"target_modules": ["Wqkv", "Wo"]}),
    "modernbert_tokens": ("modernbert_bias_task", "tokens", 3, {"target_modules": ["Wqkv", "Wi"]}),
    "bert_dora": ("bert", SINGLE, 3, {"target_modules": ["query", "output.dense"], "use_dora": True}),
    "bert_prompt": ("bert", SINGLE, 3, {"of": PromptTuningConfig, "num_virtual_tokens": 4}),
    "bert_prompt_tokens": ("bert", "tokens", 3, {"of": PromptTuningConfig, "num_virtual_tokens": 4}),
    "roberta_prompt": ("roberta", MULTI, 2, {"of": PromptTuningConfig, "num_virtual_tokens": 3}),
    "distilbert_prompt": ("distilbert", REGRESSION, 1, {"of": PromptTuningConfig, "num_virtual_tokens": 2, **DISTILBERT}),
    "modernbert_prompt": ("modernbert_bias_task", SINGLE, 3, {"of": PromptTuningConfig, "num_virtual_tokens": 4}),
    "bert_p_mlp": ("bert", SINGLE, 3, {"of": PromptEncoderConfig, "num_virtual_tokens": 4, "encoder_hidden_size": 6}),
    "roberta_p_lstm": ("roberta", "tokens", 3, {"of": PromptEncoderConfig, "num_virtual_tokens": 3, "encoder_hidden_size": 5,
                                               "encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1}),
    "bert_prefix": ("bert", SINGLE, 3, {"of": PrefixTuningConfig, "num_virtual_tokens": 4}),
    "bert_prefix_projection": ("bert", "tokens", 3, {"of": PrefixTuningConfig, "num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 5}),
    "roberta_prefix": ("roberta", REGRESSION, 1, {"of": PrefixTuningConfig, "num_virtual_tokens": 5}),
    "bert_ia3": ("bert", SINGLE, 3, {"of": IA3Config}),
    "distilbert_ia3": ("distilbert", "tokens", 3, {"of": IA3Config, "target_modules": ["k_lin", "v_lin", "lin2"], "feedforward_modules": ["lin2"]}),
    "bert_adalora": ("bert", SINGLE, 3, {"of": AdaLoraConfig, "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 2, "total_step": STEPS, "lora_alpha": 8,
                                         "target_modules": ["query", "value", "intermediate.dense"]}),
    "roberta_vera": ("roberta", SINGLE, 3, {"of": VeraConfig, "r": 6, "target_modules": ["query", "value"]}),
    "bert_norms": ("bert", MULTI, 3, {"of": LNTuningConfig, "target_modules": ["LayerNorm"]}),
    # PEFT has no such method
    "bert_bitfit": ("bert", SINGLE, 3, None),
    "distilbert_bitfit": ("distilbert", "tokens", 3, None),
    # heads on decoders: over the last token, or over every one (where PEFT takes all-linear for the head as well, and fails)
    "gpt2_last": ("decoders/gpt2", SINGLE, 3, {"target_modules": "all-linear"}),
    "gpt2_tokens": ("decoders/gpt2", "tokens", 3, {"target_modules": ["c_attn", "c_proj"]}),
    "gpt_neox_last": ("decoders/gpt_neox", SINGLE, 3, {"target_modules": "all-linear"}),
    "gpt_neox_tokens": ("decoders/gpt_neox_serial", "tokens", 3, {"target_modules": ["query_key_value", "dense"]}),
    "llama_last": ("llama/plain", MULTI, 3, {"target_modules": "all-linear"}),
    "llama_tokens": ("llama/gqa_tied", "tokens", 4, {"target_modules": ["q_proj", "up_proj"]}),
    "mistral_last": ("decoders/mistral", SINGLE, 2, {"target_modules": "all-linear"}),
    "opt_last": ("decoders/opt", SINGLE, 3, {"target_modules": "all-linear"}),
    "opt_post_last": ("decoders/opt_post_norm", REGRESSION, 1, {"target_modules": "all-linear"}),
    "qwen2_last": ("decoders/qwen2", REGRESSION, 1, {"target_modules": "all-linear"}),
    "qwen2_tokens": ("decoders/qwen2_window", "tokens", 3, {"target_modules": ["q_proj", "v_proj"]}),
    "qwen3_last": ("decoders/qwen3", SINGLE, 3, {"target_modules": "all-linear"}),
    "gemma2_last": ("decoders/gemma2", SINGLE, 3, {"target_modules": "all-linear"}),
    "gemma3_last": ("decoders/gemma3", SINGLE, 3, {"target_modules": "all-linear"}),
    "phi3_last": ("decoders/phi3", SINGLE, 3, {"target_modules": "all-linear"}),
    "phi3_tokens": ("decoders/phi3_window", "tokens", 3, {"target_modules": ["qkv_proj", "down_proj"]}),
    "gemma_last": ("decoders/gemma", SINGLE, 3, {"target_modules": "all-linear"}),
    "olmo2_last": ("decoders/olmo2", SINGLE, 3, {"target_modules": "all-linear"}),
    "smollm3_last": ("decoders/smollm3", SINGLE, 3, {"target_modules": "all-linear"}),
    "starcoder2_last": ("decoders/starcoder2", SINGLE, 3, {"target_modules": "all-linear"}),
    "phi_last": ("decoders/phi", SINGLE, 3, {"target_modules": "all-linear"}),
    "stablelm_last": ("decoders/stablelm", SINGLE, 3, {"target_modules": "all-linear"}),
    "starcoder2_tokens": ("decoders/starcoder2_window", "tokens", 3, {"target_modules": ["q_proj", "mlp.c_proj"]}),
    "stablelm_tokens": ("decoders/stablelm_parallel", "tokens", 3, {"target_modules": ["q_proj", "down_proj"]}),
    "llama_prompt_even": ("llama/gqa_tied", SINGLE, 3, {"of": PromptTuningConfig, "num_virtual_tokens": 4}),
    "llama_prompt_tokens": ("llama/gqa_tied", "tokens", 3, {"of": PromptTuningConfig, "num_virtual_tokens": 3}),
    "gpt2_prefix": ("decoders/gpt2", SINGLE, 3, {"of": PrefixTuningConfig, "num_virtual_tokens": 4}),
    "llama_ia3": ("llama/gqa_tied", SINGLE, 3, {"of": IA3Config}),
}
# without settings
R4 = {"r": 4, "lora_alpha": 8}


def labels_of(problem, n, rows, rng):
    if problem == "tokens":
        return [[rng.randrange(n) if rng.random() < 0.7 else -100 for _ in row] for row in rows]
    one = {SINGLE: lambda: rng.randrange(n), REGRESSION: lambda: round(rng.gauss(0, 2), 3), MULTI: lambda: [rng.randrange(2) for _ in range(n)]}
    return [one[problem]() for _ in rows]


def forward(model, problem, rows, labels, types, lead):
    """`lead` rows of a prompt have logits of tokens too, in PEFT: they are given no labels here, and dropped."""
    ids, mask = padded(rows, 1)
    if problem == "tokens":
        labels = [[-100] * lead + l + [-100] * (ids.shape[1] - len(l)) for l in labels]
    target = torch.tensor(labels, dtype=torch.float32 if problem in (MULTI, REGRESSION) else torch.int64)
    more = {"token_type_ids": padded(types, 0)[0]} if types else {}
    return model(input_ids=ids, attention_mask=mask, labels=target, **more)


class Biases(torch.nn.Module):
    """BitFit (Ben Zaken et al. 2022): all biases of linear layers and norms, and the head."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model
        for name, p in model.named_parameters():
            p.requires_grad_(name.endswith(".bias") or name.startswith("classifier."))

    def forward(self, **inputs):
        return self.base_model(**inputs)

    def save(self, directory, base):
        """In the form of PEFT's files."""
        trained = {f"base_model.model.{n}": p.detach().clone() for n, p in self.base_model.named_parameters() if p.requires_grad}
        directory.mkdir(parents=True)
        save_file(trained, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {"peft_type": "BITFIT", "base_model_name_or_path": base, "modules_to_save": ["classifier"]}
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def adapted(model, settings, task_type):
    """The model with the adapter of a case."""
    if settings is None:
        return Biases(model)
    if "of" not in settings:
        return get_peft_model(model, LoraConfig(task_type=task_type, **R4, **settings))
    settings = dict(settings)
    return get_peft_model(model, settings.pop("of")(task_type=task_type, **settings))


def save(peft, directory, base):
    """The adapter, and what trains it and is not in its file."""
    if isinstance(peft, Biases):
        return peft.save(directory, base)
    save_adapter(peft, directory, base)
    config = peft.peft_config["default"]
    if config.peft_type == "P_TUNING" or getattr(config, "prefix_projection", False):
        state = hidden_state(peft.prompt_encoder["default"], config.peft_type, config.num_layers)
        head = {f"base_model.{n.replace('.modules_to_save.default', '')}": p for n, p in peft.base_model.named_parameters() if p.requires_grad}
        save_file({**state, **{n: p.detach().clone() for n, p in head.items()}}, directory / "encoder.safetensors")


def base_model(base, tokens, classes, problem):
    """The tiny model at `base` with a head, its dropout off; and the keys of its dropout."""
    directory = HERE / base
    config = AutoConfig.from_pretrained(directory)
    off = OFF.get(config.model_type, ["classifier_dropout"])
    for key in off:
        setattr(config, key, 0.0)
    config.num_labels, config.pad_token_id = classes, 1
    if not tokens:
        config.problem_type = problem
    auto = AutoModelForTokenClassification if tokens else AutoModelForSequenceClassification
    more = {} if base.startswith("encoders/") else {"attn_implementation": "eager"}
    return auto.from_pretrained(directory, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, **more), off


def task_rows(seed, problem, classes, config, lengths=None):
    """Rows with their labels; the second half of each of BERT's is another text."""
    rng = random.Random(seed)
    lengths = lengths or [rng.randrange(3, 20) for _ in range(12)]
    rows = token_rows(seed, lengths, config.vocab_size)
    labels = labels_of(problem, classes, rows, rng)
    two = config.model_type == "bert" and problem != "tokens"
    types = [[int(i >= len(r) // 2) for i in range(len(r))] for r in rows] if two else None
    return {"rows": rows, "labels": labels, "types": types}


def train(model, problem, data, in_front, rate=LR):
    """Logits of each row, or of its first token, before the first step; losses and gradient norms of all steps."""
    rows, labels, types = data["rows"], data["labels"], data["types"]
    tokens = problem == "tokens"
    model.eval()
    with torch.no_grad():
        logits = forward(model, problem, rows, labels, types, in_front).logits
    first = [logits[i, in_front].tolist() if tokens else logits[i].tolist() for i in range(len(rows))]
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=rate)
    losses, norms = [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate * (STEPS - step) / STEPS
        at = (step * BATCH) % len(rows)
        part = slice(at, at + BATCH)
        optimizer.zero_grad()
        loss = forward(model, problem, rows[part], labels[part], types and types[part], in_front).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(params, 1.0).item())
        optimizer.step()
        if "AdaLora" in type(getattr(model, "base_model", None)).__name__:
            model.base_model.update_and_allocate(step)  # its penalty is in the loss already
        losses.append(loss.item())
    return {"logits": first, "losses": losses, "grad_norms": norms, "trainable_parameters": sum(p.numel() for p in params)}


def record(name, seed, case, adapt):
    """Trains a case. `adapt` puts an adapter on the model, makes it random and saves it; it gives the model to train, and
    the rows that tokens' logits have in front."""
    base, problem, classes = case
    base = base if "/" in base else f"encoders/{base}"
    out = HERE / "peft_tasks" / name
    shutil.rmtree(out, ignore_errors=True)
    torch.manual_seed(seed)
    model, off = base_model(base, problem == "tokens", classes, problem)
    config = model.config
    model, in_front = adapt(model, out, f"golden/{base}")
    # a decoder's head under a prompt reads the last place, padding or not: PEFT's rows must be as long as each other
    data = task_rows(seed, problem, classes, config, [9] * 12 if name.endswith("_even") else None)
    expected = {"base": base, "problem": problem, "classes": classes, "off": list(off), **data, **train(model, problem, data, in_front)}
    write_rounded(out / "expected.json", expected)


def main(wanted):
    for seed, (name, (*case, settings)) in enumerate(CASES.items()):
        if wanted and name not in wanted:
            continue

        def adapt(model, directory, base):
            tokens = case[1] == "tokens"
            peft = adapted(model, settings, "TOKEN_CLS" if tokens else "SEQ_CLS")
            perturb(peft, seed)
            save(peft, directory, base)
            prompts = (settings or {}).get("of") in (PromptTuningConfig, PromptEncoderConfig)
            return peft, settings["num_virtual_tokens"] if prompts and tokens else 0

        record(name, seed, case, adapt)


if __name__ == "__main__":
    main(sys.argv[1:])
