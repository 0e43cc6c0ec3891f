//! What `memory::estimate` adds up, beside numbers counted by hand and peaks measured by `checks/plan.py`.

use engobe_adapters::{Adapter, AdapterSizes};
use engobe_formats::peft::{LoraConfig, PeftConfig, TargetModules};
use engobe_models::{LoadOptions, Outline, WeightDtype};
use engobe_train::memory::advice::{Storage, choose, fits, suggestions};
use engobe_train::memory::{Estimate, Run, estimate};
use engobe_train::plan::{ComputeDtype, OptimizerKind, Plan};
use serde_json::json;
use std::fs;

/// d, f, layers, heads, kv heads, vocabulary, tied
type Sizes = (usize, usize, usize, usize, usize, usize, bool);

const SMOL: Sizes = (576, 1536, 30, 9, 3, 49152, true);
const WIDE: Sizes = (2048, 5632, 6, 32, 4, 32000, false);
const LLAMA_13B: Sizes = (5120, 13824, 40, 40, 40, 32000, false);

/// A model of which there is only a `config.json`.
fn outline(
    (d, f, layers, heads, kv_heads, vocab, tied): Sizes,
    dtype: &str,
    options: &LoadOptions,
) -> Outline {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({
        "model_type": "llama", "hidden_size": d, "intermediate_size": f, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "tie_word_embeddings": tied, "torch_dtype": dtype,
    });
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let outline = Outline::read(dir.path(), options).unwrap();
    assert!(!outline.has_weights);
    outline
}

fn sizes(outline: &mut Outline, r: usize, targets: Option<&[&str]>) -> AdapterSizes {
    let target_modules = Some(match targets {
        None => TargetModules::AllLinear,
        Some(names) => TargetModules::List(names.iter().map(|s| s.to_string()).collect()),
    });
    Adapter::sizes(outline.model.as_mut(), &LoraConfig { r, target_modules, ..Default::default() }).unwrap()
}

fn plan(len: usize, checkpointing: bool) -> Plan {
    let mut plan = Plan::default();
    plan.schedule.max_seq_len = len;
    plan.compute.activation_checkpointing = checkpointing;
    plan
}

fn run<'a>(outline: &'a Outline, adapter: &'a AdapterSizes, plan: &'a Plan) -> Run<'a> {
    Run {
        sizes: outline.sizes,
        tensors: &outline.tensors,
        adapter,
        plan,
        tokenizer: 0,
        eval_tokens: 0,
        threads: 2,
    }
}

#[test]
fn weights_adapter_and_optimizer_are_counted_exactly() {
    let mut outline = outline(LLAMA_13B, "float16", &LoadOptions::default());
    let adapter = sizes(&mut outline, 16, None);
    // 40 blocks of 4 attention matrices and 3 of the MLP
    let factors = 40 * 16 * (4 * (5120 + 5120) + 3 * (5120 + 13824));
    assert_eq!((adapter.num_parameters(), factors), (62_586_880, 62_586_880));
    let mut plan = plan(512, true);
    let found = estimate(&run(&outline, &adapter, &plan));
    let matrices = 40 * (4 * 5120 * 5120 + 3 * 5120 * 13824) + 2 * 32000 * 5120;
    assert_eq!(found.weights, 2 * matrices);
    assert_eq!((found.adapter, found.gradients), (4 * factors, 4 * factors));
    assert_eq!((found.optimizer, found.optimizer_file), (8 * factors, 0));
    plan.optimization.optimizer = OptimizerKind::AdamW8bit;
    // two codes an element, and two factors for 256 of them
    let eight = estimate(&run(&outline, &adapter, &plan)).optimizer;
    assert!((eight as f64 / factors as f64 - 2.03125).abs() < 1e-3, "{eight}");
    plan.optimization.optimizer = OptimizerKind::PagedAdamW;
    let paged = estimate(&run(&outline, &adapter, &plan));
    assert_eq!((paged.optimizer, paged.optimizer_file), (8 * 16 * 13824, 8 * factors));
}

#[test]
fn activations_follow_the_formulae() {
    let mut outline = outline(SMOL, "float32", &LoadOptions::default());
    let adapter = sizes(&mut outline, 16, None);
    let (n, d, f, kv) = (512, 576, 1536, 192);
    // by hand: a block keeps 2d + 2a + 2kv + 2f + heads + 2 + 7r numbers a token; then the hidden states, the gradient
    // of the block's output, and the gated activation's backward
    let kept = 30 * n * (4 * d + 2 * kv + 2 * f + 9 + 2 + 7 * 16);
    let top = n * (2 * d + d + 3 * f);
    let full = plan(512, false);
    assert_eq!(estimate(&run(&outline, &adapter, &full)).activations, 4 * (kept + top));
    let on = plan(512, true);
    let found = estimate(&run(&outline, &adapter, &on)).activations;
    // inputs of 30 blocks, and one block
    assert!(
        found > 4 * (30 * n * d + kept / 30) && found < 4 * (30 * n * d + kept / 30 + 2 * top),
        "{found}"
    );
    // twice the tokens, twice the activations; rows of a batch are tokens
    for (len, batch) in [(1024, 1), (512, 2)] {
        let mut plan = plan(len, false);
        plan.schedule.batch_size = batch;
        let twice = estimate(&run(&outline, &adapter, &plan)).activations;
        assert_eq!(twice, 8 * (kept + top), "{len} x {batch}");
    }
    // below the lowest adapter nothing is kept
    let upper = AdapterSizes {
        layers: adapter.layers.iter().filter(|l| l.path.contains(".29.")).cloned().collect(),
        ..AdapterSizes::default()
    };
    assert_eq!(estimate(&run(&outline, &upper, &full)).activations, 4 * (kept / 30 + top));
}

/// What other methods than LoRA keep in a block, by hand as above.
#[test]
fn bottlenecks_prompts_and_prefixes_are_counted() {
    let (n, d, f, kv) = (512, 576, 1536, 192);
    let keys = |rows: usize| rows * 2 * kv;
    let block = |n: usize, more: usize| n * (4 * d + 2 * f + 9 + 2 + more);
    // the hidden states, the gradient of the block's output, the gated activation's backward
    let top = |n: usize| n * (2 * d + d + 3 * f);
    let all_blocks = |n: usize, more: usize| 30 * (block(n, more) + keys(n)) + top(n);
    for (kind, settings, expected) in [
        // what it reads, and what goes into its activation
        ("BOTTLENECK", json!({ "architecture": "pfeiffer" }), all_blocks(n, d + 36)),
        (
            "BOTTLENECK",
            json!({ "architecture": "houlsby", "reduction_factor": 4 }),
            all_blocks(n, 2 * (d + 144)),
        ),
        // it reads the residual, which is kept anyway
        ("BOTTLENECK", json!({ "architecture": "parallel" }), all_blocks(n, 288)),
        ("BOTTLENECK", json!({ "scaling": "channel", "ln_after": true }), all_blocks(n, 3 * d + 36)),
        (
            "BOTTLENECK",
            json!({ "architecture": "pfeiffer", "leave_out": (0..20).collect::<Vec<_>>() }),
            10 * (block(n, d + 36) + keys(n)) + top(n),
        ),
        // u = A·x of seven layers, and each layer's scaled parts of A and B whatever the tokens
        (
            "VERA",
            json!({ "r": 8, "target_modules": "all-linear" }),
            all_blocks(n, 7 * 8) + 30 * 8 * (4 * d + 2 * d + 2 * kv + 3 * (d + f)),
        ),
        // a prompt lengthens rows, a prefix keys and values
        ("PROMPT_TUNING", json!({ "num_virtual_tokens": 100 }), all_blocks(n + 100, 0)),
        ("PREFIX_TUNING", json!({ "num_virtual_tokens": 100 }), 30 * (block(n, 0) + keys(n + 100)) + top(n)),
    ] {
        let mut config = PeftConfig::new(kind);
        for (key, value) in settings.as_object().unwrap() {
            config.set(key, value.clone());
        }
        let mut outline = outline(SMOL, "float32", &LoadOptions::default());
        let adapter = Adapter::sizes(outline.model.as_mut(), config).unwrap();
        let found = estimate(&run(&outline, &adapter, &plan(512, false))).activations;
        assert_eq!(found, 4 * expected, "{kind} {settings}");
    }
}

/// Peaks in MB that `checks/plan.py` measured (docs/memory.md); the issue asks for 10 %.
#[test]
fn peaks_are_those_that_were_measured() {
    let stored = LoadOptions::default();
    let widened = LoadOptions { dtype: WeightDtype::F32, ..LoadOptions::default() };
    let qv: Option<&[&str]> = Some(&["q_proj", "v_proj"]);
    for (sizes_of, dtype, options, targets, len, checkpointing, optimizer, measured) in [
        (SMOL, "float32", &stored, None, 512, false, OptimizerKind::AdamW, 995.0),
        (SMOL, "bfloat16", &stored, None, 1024, true, OptimizerKind::AdamW, 483.0),
        (SMOL, "bfloat16", &widened, None, 256, false, OptimizerKind::AdamW, 822.0),
        (SMOL, "bfloat16", &stored, qv, 512, false, OptimizerKind::AdamW, 677.0),
        (WIDE, "bfloat16", &stored, None, 512, false, OptimizerKind::AdamW, 1164.0),
        (WIDE, "bfloat16", &stored, None, 2048, true, OptimizerKind::Sgd, 1357.0),
    ] {
        let mut outline = outline(sizes_of, dtype, options);
        let adapter = sizes(&mut outline, 16, targets);
        let mut plan = plan(len, checkpointing);
        plan.optimization.optimizer = optimizer;
        let peak = estimate(&run(&outline, &adapter, &plan)).peak as f64 / 1e6;
        assert!((peak / measured - 1.0).abs() < 0.1, "{sizes_of:?} {len}: {peak:.0} MB, measured {measured}");
    }
}

#[test]
fn what_is_kept_in_16_bits_takes_half() {
    let mut outline = outline(SMOL, "float32", &LoadOptions::default());
    let adapter = sizes(&mut outline, 16, None);
    let (n, d, f, kv) = (512, 576, 1536, 192);
    // 2 bytes each but for log-sum-exps and norms' factors; gate and up are widened beside their gradients as their own
    // 16 bits go
    let kept = 30 * n * (2 * (4 * d + 2 * kv + 2 * f + 7 * 16) + 4 * (9 + 2));
    let top = 4 * n * (2 * d + d + 3 * f) + 2 * n * 2 * f;
    let mut half = plan(512, false);
    half.compute.compute_dtype = ComputeDtype::BF16;
    assert_eq!(estimate(&run(&outline, &adapter, &half)).activations, kept + top);
    let mut checkpointed = plan(512, true);
    let full = estimate(&run(&outline, &adapter, &checkpointed)).activations;
    checkpointed.compute.compute_dtype = ComputeDtype::F16;
    // inputs of 30 blocks take half; the block that runs again has the same work to do in f32
    let less = full - estimate(&run(&outline, &adapter, &checkpointed)).activations;
    assert!(less > 2 * 29 * n * d && less < 2 * 30 * n * d + kept / 30, "{less}");
}

/// As above, with `--compute-dtype`.
#[test]
fn peaks_in_16_bits_are_those_that_were_measured() {
    for (sizes_of, dtype, compute, measured) in
        [(SMOL, "float32", ComputeDtype::BF16, 824.0), (WIDE, "bfloat16", ComputeDtype::F16, 1064.0)]
    {
        let mut outline = outline(sizes_of, dtype, &LoadOptions::default());
        let adapter = sizes(&mut outline, 16, None);
        let mut plan = plan(512, false);
        plan.compute.compute_dtype = compute;
        let peak = estimate(&run(&outline, &adapter, &plan)).peak as f64 / 1e6;
        assert!((peak / measured - 1.0).abs() < 0.1, "{sizes_of:?}: {peak:.0} MB, measured {measured}");
    }
}

#[test]
fn a_choice_keeps_the_window_and_the_limit() {
    let mut outline = outline(SMOL, "bfloat16", &LoadOptions::default());
    let adapter = sizes(&mut outline, 16, None);
    let mut asked = plan(512, false);
    asked.schedule.batch_size = 8;
    asked.schedule.gradient_accumulation = 2;
    let of = |plan: &Plan| estimate(&run(&outline, &adapter, plan));
    let mut last = usize::MAX;
    for limit in [5_000, 2_000, 1_000, 600, 450] {
        let (chosen, found) = choose(&run(&outline, &adapter, &asked), limit * 1_000_000).unwrap();
        let s = &chosen.schedule;
        assert_eq!(s.batch_size * s.gradient_accumulation, 16);
        assert!(found == of(&chosen) && fits(&found, limit * 1_000_000) && found.peak <= last);
        last = found.peak;
    }
    // as asked if there is room, and not at all if there is none
    assert_eq!(choose(&run(&outline, &adapter, &asked), 1 << 40).unwrap().0, asked);
    assert!(choose(&run(&outline, &adapter, &asked), 300_000_000).is_none());
}

#[test]
fn suggestions_fit_and_none_is_needless() {
    let mut outline_16 = outline(LLAMA_13B, "float16", &LoadOptions::default());
    let adapter = sizes(&mut outline_16, 16, None);
    let nf4 = engobe_kernels::quantize::Scheme::FourBit {
        kind: engobe_kernels::codec::FourBit::Nf4,
        block: 64,
        double: true,
    };
    let options = LoadOptions { quantize: Some(nf4), ..LoadOptions::default() };
    let quantized = outline(LLAMA_13B, "float16", &options);
    let settings = vec![("quantize".to_string(), "nf4".to_string())];
    let others = [Storage { settings, tensors: quantized.tensors }];
    let plan = plan(512, false);
    let found = suggestions(&run(&outline_16, &adapter, &plan), &others, 16_000_000_000, 4);
    assert!(!found.is_empty());
    for s in &found {
        assert!(fits(&s.estimate, 16_000_000_000), "{s:?}");
        // 26 GB of f16 fit no other way
        assert!(s.settings.iter().any(|(name, _)| name == "quantize"), "{s:?}");
    }
    let names = |i: usize| found[i].settings.iter().map(|(n, _)| n.as_str()).collect::<Vec<_>>();
    for i in 0..found.len() {
        for j in 0..found.len() {
            assert!(i == j || !names(j).iter().all(|n| names(i).contains(n)), "{found:?}");
        }
    }
    assert!(suggestions(&run(&outline_16, &adapter, &plan), &others, 1_000_000_000, 4).is_empty());
    let _: Estimate = found[0].estimate;
}
