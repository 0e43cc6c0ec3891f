"""Ten steps of PEFT's methods over a tiny encoder of every family, with a head beside them: logits, losses, gradient norms.

    pip install -r golden/requirements.txt && python golden/encoder_matrix.py [FAMILY...]

Writes golden/encoder_matrix/FAMILY.json: rows and labels, and an entry for each method. As in matrix.py no adapter is stored:
names and indices say its values, those of the head too. Models are those of golden/encoders.
"""

import sys

import torch
from matrix import fill, methods
from peft import get_peft_model
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
}
# what all-linear stands for; PEFT takes pre_classifier for it as well, which it then cannot train in full
ALL_OF_DISTILBERT = ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]
# PEFT needs a model that takes past_key_values
NO_PREFIX = ["distilbert", "deberta_v2", "modernbert"]


def main():
    (HERE / "encoder_matrix").mkdir(exist_ok=True)
    for seed, (family, (base, attention, feed_forward, norms, told)) in enumerate(FAMILIES.items()):
        if sys.argv[1:] and family not in sys.argv[1:]:
            continue
        data, found = None, {}
        for name, (kind, settings) in methods(attention, feed_forward, norms, None).items():
            # trainable tokens have no modules_to_save: the head would be lost
            if name == "trainable-tokens" or name == "prefix-tuning" and family in NO_PREFIX:
                continue
            print(family, name, flush=True)
            torch.manual_seed(seed)
            model, off = base_model(base, False, CLASSES, SINGLE)
            data = data or task_rows(seed, SINGLE, CLASSES, model.config)
            if "num_virtual_tokens" in settings:
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
