//! The small random models: they load, and their weights are what they should be; and what models' metadata comes to.

#[path = "synth/config.rs"]
mod config;
mod support;

use std::path::PathBuf;

use airstream::engine::Loaded;
use airstream::error::Kind;
use airstream::format::gguf::Gguf;
use airstream::format::quant::{QuantType, dequantize_row};
use support::gguf_writer::GgufWriter;
use support::synth::{all_specs, write, write_with};

#[test]
fn every_model_loads_and_its_weights_have_the_wanted_deviation() {
    let folder = tempfile::tempdir().unwrap();
    let mut seen = std::collections::BTreeSet::new();
    for (name, spec) in all_specs() {
        let path = folder.path().join(format!("{name}.gguf"));
        write(&spec, &path).unwrap();
        let gguf = Gguf::open(&path).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(gguf.tensor("output.weight").is_none(), spec.tied, "{name}");
        for tensor in gguf.tensors().iter().filter(|t| t.rows > 1) {
            seen.insert(tensor.qtype);
            let data = &bytes[tensor.offset as usize..][..tensor.bytes as usize];
            let mut values = vec![0.0; tensor.cols * tensor.rows];
            dequantize_row(tensor.qtype, data, &mut values);
            let count = values.len() as f32;
            let mean = values.iter().sum::<f32>() / count;
            let deviation = (values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / count).sqrt();
            let wanted = 1.0 / (tensor.cols as f32).sqrt();
            let gain = deviation / wanted;
            assert!(
                gain > 0.9 && gain < 1.8,
                "{name} {}: gain {gain}",
                tensor.name
            );
            assert!(
                mean.abs() < 0.1 * wanted,
                "{name} {}: mean {mean}",
                tensor.name
            );
        }
    }
    assert_eq!(seen.len(), QuantType::ALL.len());
}

#[test]
fn a_tensor_that_nothing_computes_with_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.gguf");
    let (_, spec) = &all_specs()[0];
    for name in [
        "blk.0.attn_q.bias",
        "output.bias",
        "blk.99.attn_norm.weight",
        "cls",
    ] {
        let add = |file: &mut GgufWriter| file.tensor(name, &[64], QuantType::F32, vec![0; 256]);
        write_with(spec, &path, add).unwrap();
        let Err(error) = Loaded::read(&path) else {
            panic!("{name} is left out without a word");
        };
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.what().contains(name), "{error}");
    }
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (_, spec) = all_specs().pop().unwrap();
    let paths = ["a", "b"].map(|name| folder.path().join(name));
    for path in &paths {
        write(&spec, path).unwrap();
    }
    assert!(std::fs::read(&paths[0]).unwrap() == std::fs::read(&paths[1]).unwrap());
}

/// For `tests/reference/`: writes all models into the folder named by `AIRSTREAM_SYNTH_DIR`.
#[test]
#[ignore = "writes files for the reference scripts"]
fn write_all_models() {
    let folder = PathBuf::from(std::env::var_os("AIRSTREAM_SYNTH_DIR").expect("a folder"));
    std::fs::create_dir_all(&folder).unwrap();
    for (name, spec) in all_specs() {
        write(&spec, &folder.join(format!("{name}.gguf"))).unwrap();
    }
}
