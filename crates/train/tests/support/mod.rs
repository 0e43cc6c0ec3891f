//! A run over the rows of `golden/peft`, as the golden scripts make one with PEFT.

use engobe_adapters::Adapter;
use engobe_data::{EncodeOptions, Encoder, Loader, LoaderOptions, PromptStyle, TrainOn, reader};
use engobe_nn::CausalLm;
use engobe_testkit::golden;
use engobe_train::plan::Plan;
use engobe_train::{Silent, Trainer, metrics};
use std::path::Path;
use std::sync::Arc;

/// Trains by `plan`, two rows in a micro-batch, in their order; leaves what a run leaves in `out`. All steps.
pub fn train(model: &dyn CausalLm, adapter: &Adapter, plan: &Plan, out: &Path) -> Vec<metrics::StepMetrics> {
    let files = reader::read(&[golden("peft/rows.jsonl")]).unwrap();
    let options = EncodeOptions { train_on: TrainOn::Completions, style: PromptStyle::Auto, max_seq_len: 64 };
    let encoder = Encoder::new(None, model.info().vocab_size, options).unwrap();
    let samples = Arc::new(encoder.encode(&files).unwrap());
    let order =
        LoaderOptions { batch_size: 2, max_seq_len: 64, packing: false, shuffle: false, seed: 0, lead: 0 };
    let loader = Loader::new(samples, order);
    let mut trainer = Trainer::new(model, adapter, plan, loader, vec![], out, String::new()).unwrap();
    trainer.run(&mut Silent).unwrap();
    metrics::read(&out.join("metrics.jsonl")).unwrap()
}
