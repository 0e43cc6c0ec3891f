"""Ten steps of PEFT's methods over a tiny encoder of every family, with a head beside them: logits, losses, gradient norms.

    pip install -r golden/requirements.txt && python golden/encoder_matrix.py [FAMILY...]

Writes golden/encoder_matrix/FAMILY.json: rows and labels, and an entry for each method. As in matrix.py no adapter is stored:
names and indices say its values, those of the head too. Models are those of golden/encoders.
"""

import sys

import torch
from matrix import fill, methods
from peft import LoraConfig, get_peft_model
from peft_tasks import DISTILBERT, SINGLE, base_model, task_rows, train
from shared import HERE, write_rounded

CLASSES, LR = 3, 5e-3
BERT = (["key", "value"], ["output.dense"], ["attention.output.LayerNorm", "embeddings.LayerNorm"])
# family -> base, keys and values, the end of the feed-forward, norms, what PEFT must be told of the model
FAMILIES = {
    "bert": ("encoders/bert", *BERT, {}),
    "roberta": ("encoders/roberta", *BERT, {}),
    "distilbert": ("encoders/distilbert", ["k_lin", "v_lin"], ["lin2"], ["sa_layer_norm", "output_layer_norm"], DISTILBERT),
    "deberta_v2": ("encoders/deberta_v2_conv_task", ["key_proj", "value_proj"], ["output.dense"], ["LayerNorm"], {}),
    "modernbert": ("encoders/modernbert_bias_task", ["Wqkv"], ["mlp.Wo"], ["mlp_norm", "final_norm"], {}),
    "electra": ("encoders/electra_task", *BERT, {"token_dim": 24}),
}
# what all-linear stands for; PEFT takes pre_classifier for it as well, which it then cannot train in full
ALL_OF_DISTILBERT = ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]
# the embedding of tokens, and a module that is trained in full beside the head
MORE = {
    "bert": ("word_embeddings", "pooler.dense"),
    "roberta": ("word_embeddings", "layer.1.output.dense"),
    "distilbert": ("word_embeddings", "layer.0.ffn.lin1"),
    "deberta_v2": ("word_embeddings", "rel_embeddings"),
    "electra": ("word_embeddings", "embeddings_project"),
    "modernbert": ("tok_embeddings", "layers.1.attn_norm"),
}
# prefixes: PEFT needs a model that takes past_key_values; the other: engobe does not train a convolution's bias
LEFT_OUT = {"distilbert": ["prefix-tuning"], "deberta_v2": ["prefix-tuning", "lora-bias-all"], "modernbert": ["prefix-tuning"]}


def loras(attention, embedding, saved):
    """LoRA's more rarely used settings."""
    small = dict(r=2, lora_alpha=4)
    return {
        "lora-bias-all": (LoraConfig, dict(**small, target_modules=attention, bias="all")),
        "lora-bias-only": (LoraConfig, dict(**small, target_modules=attention, bias="lora_only")),
        "lora-embedding": (LoraConfig, dict(**small, target_modules=[*attention, embedding], use_rslora=True)),
        "lora-saved": (LoraConfig, dict(**small, target_modules=attention, modules_to_save=["classifier", saved])),
        "lora-tokens": (LoraConfig, dict(**small, target_modules=attention, trainable_token_indices=[3, 17, 5])),
        "lora-one-layer": (LoraConfig, dict(**small, target_modules=attention, layers_to_transform=[1], lora_bias=True)),
    }


def main():
    (HERE / "encoder_matrix").mkdir(exist_ok=True)
    for seed, (family, (base, attention, feed_forward, norms, told)) in enumerate(FAMILIES.items()):
        if sys.argv[1:] and family not in sys.argv[1:]:
            continue
        data, found = None, {}
        for name, (kind, settings) in (methods(attention, feed_forward, norms, None) | loras(attention, *MORE[family])).items():
            # trainable tokens have no modules_to_save: the head would be lost
            if name == "trainable-tokens" or name in LEFT_OUT.get(family, ()):
                continue
            print(family, name, flush=True)
            torch.manual_seed(seed)
            model, off = base_model(base, False, CLASSES, SINGLE)
            data = data or task_rows(seed, SINGLE, CLASSES, model.config)
            if "num_virtual_tokens" in settings and name != "prefix-tuning":
                settings = {**settings, **told}
            if family == "distilbert" and name == "lora":
                settings = {**settings, "target_modules": ALL_OF_DISTILBERT}
            config = kind(task_type="SEQ_CLS", **settings)
            peft = get_peft_model(model, config)
            fill(peft)
            written = {"peft_type": config.peft_type.value, "task_type": "SEQ_CLS", "modules_to_save": ["classifier"], **settings}
            found[name] = {"config": written, **train(peft, SINGLE, data, 0, LR)}
        rows = {"base": base, "problem": SINGLE, "classes": CLASSES, "off": off, **data}
        write_rounded(HERE / "encoder_matrix" / f"{family}.json", {**rows, "learning_rate": LR, "methods": found})


if __name__ == "__main__":
    main()
