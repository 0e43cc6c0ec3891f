//! Adapters whose values are made of names, as `fill` in `golden/matrix.py` makes them.

use candle_core::{Device, Tensor};
use engobe_adapters::{Adapter, Start};
use engobe_autograd::host;
use engobe_formats::peft::{PeftAdapter, PeftConfig};
use engobe_nn::ModuleTree;
use engobe_testkit::models::filled;
use std::collections::BTreeMap;

/// Gives `model` an adapter of this configuration. `named` is the same base, and says the names.
pub fn adapter(named: &mut dyn ModuleTree, model: &mut dyn ModuleTree, config: &PeftConfig) -> Adapter {
    let attach = |model: &mut dyn ModuleTree| {
        Adapter::attach(model, config.clone(), Start { seed: 0 }, &Device::Cpu).unwrap()
    };
    let adapter = attach(named);
    let dir = tempfile::tempdir().unwrap();
    let values = |tensors: BTreeMap<String, Tensor>| {
        let value = |(name, t): (String, Tensor)| {
            let values = bytemuck::cast_slice(&filled(&name, t.elem_count())).to_vec();
            (name, t.dims().to_vec(), values)
        };
        tensors.into_iter().map(value).collect::<Vec<(String, Vec<usize>, Vec<u8>)>>()
    };
    if !adapter.file_is_whole() {
        // an encoder that PEFT's files leave out
        PeftAdapter::save(dir.path(), adapter.config(), &values(adapter.state().unwrap())).unwrap();
        let file = PeftAdapter::load(dir.path()).unwrap();
        let adapter = attach(model);
        adapter.restore(dir.path(), &file.tensors).unwrap();
        return adapter;
    }
    PeftAdapter::save(dir.path(), adapter.config(), &values(adapter.export().unwrap())).unwrap();
    let adapter = Adapter::load(model, dir.path(), &Device::Cpu).unwrap();
    for (name, tensor) in adapter.export().unwrap() {
        let tied = ["lm_head", "embed_out", "coder.embed_tokens"];
        if tied.iter().any(|tied| name.contains(&format!("{tied}.trainable_tokens"))) {
            continue; // the same parameter as the embedding's, of whose name its values are made
        }
        assert_eq!(host(&tensor).unwrap()[..], filled(&name, tensor.elem_count())[..], "{name}");
    }
    adapter
}
