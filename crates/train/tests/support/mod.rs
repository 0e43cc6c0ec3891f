//! A run over the rows of `golden/peft`, as the golden scripts make one with PEFT.

use candle_core::Device;
use engobe_adapters::{Adapter, Start};
use engobe_data::{EncodeOptions, Encoder, Loader, LoaderOptions, PromptStyle, Sample, TrainOn, reader};
use engobe_formats::peft::PeftAdapter;
use engobe_formats::safetensors_file::SafetensorsFile;
use engobe_nn::{CausalLm, ModuleTree};
use engobe_testkit::golden;
use engobe_train::plan::Plan;
use engobe_train::{Model, Silent, Trainer, metrics};
use std::path::Path;
use std::sync::Arc;

#[allow(dead_code)] // of the tests that share this file, some train by themselves
/// Trains by `plan`, two rows in a micro-batch, in their order; leaves what a run leaves in `out`. All steps.
pub fn train(model: &dyn CausalLm, adapter: &Adapter, plan: &Plan, out: &Path) -> Vec<metrics::StepMetrics> {
    train_on(model.into(), decoder_rows(model.info().vocab_size), adapter, plan, out)
}

#[allow(dead_code)]
/// The rows of `golden/peft`.
pub fn decoder_rows(vocab_size: usize) -> Vec<Sample> {
    let files = reader::read(&[golden("peft/rows.jsonl")]).unwrap();
    let options = EncodeOptions { train_on: TrainOn::Completions, style: PromptStyle::Auto, max_seq_len: 64 };
    Encoder::new(None, vocab_size, options).unwrap().encode(&files).unwrap()
}

#[allow(dead_code)]
/// [`train`] over other rows.
pub fn train_on(
    model: Model<'_>,
    samples: Vec<Sample>,
    adapter: &Adapter,
    plan: &Plan,
    out: &Path,
) -> Vec<metrics::StepMetrics> {
    let order =
        LoaderOptions { batch_size: 2, max_seq_len: 64, packing: false, shuffle: false, seed: 0, lead: 0 };
    let loader = Loader::new(Arc::new(samples), order);
    let mut trainer = Trainer::new(model, adapter, plan, loader, vec![], out, String::new()).unwrap();
    trainer.run(&mut Silent).unwrap();
    metrics::read(&out.join("metrics.jsonl")).unwrap()
}

#[allow(dead_code)] // of the tests that share this file, some start otherwise
/// The adapter of a case as it is trained: with the encoder that a file of PEFT's leaves out.
pub fn to_train(model: &mut dyn ModuleTree, case: &str) -> Adapter {
    let dir = golden(case);
    let encoder = dir.join("encoder.safetensors");
    if !encoder.exists() {
        return Adapter::load(model, &dir, &Device::Cpu).unwrap();
    }
    let config = PeftAdapter::load(&dir).unwrap().config;
    let adapter = Adapter::attach(model, config, Start { seed: 0 }, &Device::Cpu).unwrap();
    let file = SafetensorsFile::open(&encoder).unwrap();
    adapter.restore(&encoder, &file.tensors().map(|t| (t.name.clone(), t.clone())).collect()).unwrap();
    adapter
}
