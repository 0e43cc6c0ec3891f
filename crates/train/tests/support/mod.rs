//! A run over the rows of `golden/peft`, as the golden scripts make one with PEFT.

use candle_core::Device;
use engobe_adapters::{Adapter, Start};
use engobe_data::{EncodeOptions, Encoder, Loader, LoaderOptions, PromptStyle, TrainOn, reader};
use engobe_formats::peft::PeftAdapter;
use engobe_formats::safetensors_file::SafetensorsFile;
use engobe_nn::{CausalLm, ModuleTree};
use engobe_testkit::golden;
use engobe_train::plan::Plan;
use engobe_train::{Silent, Trainer, metrics};
use std::path::Path;
use std::sync::Arc;

#[allow(dead_code)] // of the tests that share this file, some train by themselves
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
