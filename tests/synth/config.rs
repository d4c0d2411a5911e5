//! What is read of a model's metadata, and what is said where it does not do.

use crate::support::gguf_writer::{GgufWriter, array};
use crate::support::synth::{Arch, SynthSpec, write_with};
use airstream::Error;
use airstream::error::Kind;
use airstream::format::gguf::Gguf;
use airstream::format::quant::QuantType;
use airstream::model::config::Config;

/// The configuration of a small model whose metadata was changed.
fn config(arch: Arch, change: impl FnOnce(&mut GgufWriter)) -> Result<Config, Error> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("a.gguf");
    write_with(&SynthSpec::new(arch, QuantType::Q8_0, 1), &path, change).expect("a small model");
    Config::read(&Gguf::open(&path).expect("a sound file"))
}

/// Takes an entry out of the metadata.
fn remove(file: &mut GgufWriter, key: &str) {
    file.entries.retain(|(name, _, _)| name != key);
}

/// Which layers have the window.
fn local_layers(config: &Config) -> Vec<bool> {
    let layers = config.layers.iter();
    layers.map(|layer| layer.window == Some(24)).collect()
}

#[test]
fn what_llama_cpp_requires_is_required() {
    for (arch, name) in [
        (Arch::Llama, "llama"),
        (Arch::Qwen2, "qwen2"),
        (Arch::Qwen3, "qwen3"),
        (Arch::Gemma3, "gemma3"),
    ] {
        let key = format!("{name}.attention.layer_norm_rms_epsilon");
        let error = config(arch, |file| remove(file, &key)).expect_err("no epsilon");
        assert_eq!(error.kind(), Kind::Format, "{error}");
        assert!(error.to_string().contains(&key), "{error}");
    }
    // There is no Gemma 3 of the other architectures' default.
    let error = config(Arch::Gemma3, |file| remove(file, "gemma3.rope.freq_base"));
    let error = error.expect_err("no base").to_string();
    assert!(error.contains("gemma3.rope.freq_base"), "{error}");
    let llama = config(Arch::Llama, |file| remove(file, "llama.rope.freq_base"));
    assert_eq!(llama.expect("a default").ropes[0].base, 10_000.0);
}

#[test]
fn an_array_of_one_repeated_value_is_that_value() {
    let with = |key: &'static str, values: [u32; 2]| {
        config(Arch::Llama, move |file| {
            remove(file, key);
            let values: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            file.entry(key, 9, &array(4, values.len() as u64 / 4, &values));
        })
    };
    let plain = config(Arch::Llama, |_| ()).expect("a configuration");
    for (key, value) in [
        ("llama.attention.head_count", plain.heads),
        ("llama.attention.head_count_kv", plain.kv_heads),
        ("llama.feed_forward_length", plain.ff),
    ] {
        let same = with(key, [value as u32; 2]).expect("layers that are alike");
        assert_eq!(
            (same.heads, same.kv_heads, same.ff),
            (plain.heads, plain.kv_heads, plain.ff)
        );
        let error = with(key, [value as u32, 2 * value as u32]).expect_err("layers that differ");
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.to_string().contains(key), "{error}");
    }
    let error = config(Arch::Llama, |file| {
        remove(file, "llama.feed_forward_length");
        file.entry("llama.feed_forward_length", 9, &array(4, 0, &[]));
    });
    assert_eq!(error.expect_err("no layers").kind(), Kind::Format);
}

#[test]
fn gemma_has_windows_where_the_file_says() {
    let pattern = "gemma3.attention.sliding_window_pattern";
    for (period, wanted) in [
        (None, [1, 1, 1, 1, 1, 0, 1]),
        (Some(3), [1, 1, 0, 1, 1, 0, 1]),
        (Some(1), [0; 7]),
        (Some(0), [1; 7]),
    ] {
        let config = config(Arch::Gemma3, |file| {
            if let Some(period) = period {
                file.u32(pattern, period);
            }
        });
        let config = config.expect("a configuration");
        assert_eq!(local_layers(&config), wanted.map(|local| local == 1));
        let bases = config.layers.iter().map(|l| config.ropes[l.rope].base);
        let wanted = wanted.map(|local| if local == 1 { 10_000.0 } else { 1_000_000.0 });
        assert_eq!(bases.collect::<Vec<f32>>(), wanted);
    }

    let by_layer = config(Arch::Gemma3, |file| {
        file.entry(pattern, 9, &array(7, 7, &[0, 1, 0, 0, 1, 1, 0]));
        file.f32("gemma3.rope.freq_base_swa", 500.0);
    });
    let by_layer = by_layer.expect("a configuration");
    let wanted = [false, true, false, false, true, true, false];
    assert_eq!(local_layers(&by_layer), wanted);
    assert_eq!(by_layer.ropes[by_layer.layers[1].rope].base, 500.0);

    let error = config(Arch::Gemma3, |file| {
        file.entry(pattern, 9, &array(7, 2, &[0, 1]))
    });
    let error = error.expect_err("a pattern of other layers").to_string();
    assert!(error.contains(pattern), "{error}");
}

#[test]
fn gemma_without_a_window_is_global_throughout() {
    let window = "gemma3.attention.sliding_window";
    for zero in [false, true] {
        let config = config(Arch::Gemma3, |file| {
            remove(file, window);
            if zero {
                file.u32(window, 0);
            }
        });
        let config = config.expect("a configuration");
        for layer in &config.layers {
            assert_eq!(layer.window, None);
            assert_eq!(config.ropes[layer.rope].base, 1_000_000.0);
        }
    }
}

#[test]
fn positions_are_scaled_as_llama_cpp_does() {
    for (kind, factor, scale, yarn_context) in [
        (None, None, 1.0, None),
        (None, Some(4.0), 0.25, None),
        (Some("linear"), Some(4.0), 0.25, None),
        (Some("linear"), Some(0.0), 1.0, None),
        (Some("linear"), None, 1.0, None),
        (Some("none"), Some(4.0), 1.0, None),
        // The context of the model, if the file tells no original one.
        (Some("yarn"), Some(4.0), 0.25, Some(4096)),
        (Some("yarn"), Some(0.0), 1.0, Some(4096)),
    ] {
        let add = |file: &mut GgufWriter| {
            if let Some(kind) = kind {
                file.str("llama.rope.scaling.type", kind);
            }
            if let Some(factor) = factor {
                file.f32("llama.rope.scaling.factor", factor);
            }
        };
        let rope = config(Arch::Llama, add).expect("a configuration").ropes[0];
        assert_eq!(
            (rope.scale, rope.yarn_context),
            (scale, yarn_context),
            "{kind:?} {factor:?}"
        );
    }
    let yarn = config(Arch::Qwen2, |file| {
        file.str("qwen2.rope.scaling.type", "yarn");
        file.u32("qwen2.rope.scaling.original_context_length", 1000);
        file.f32("qwen2.rope.scaling.attn_factor", 0.875);
    });
    let rope = yarn.expect("a configuration").ropes[0];
    assert_eq!(
        (rope.yarn_context, rope.attention_factor),
        (Some(1000), 0.875)
    );

    // The model's own context is 4096 tokens.
    for (kind, factor, original, made_for) in [
        ("yarn", 4.0, Some(4096), 16_384),
        ("yarn", 40.0, None, 163_840),
        // Here it is the stretched one already.
        ("yarn", 4.0, Some(1024), 4096),
        ("yarn", 0.0, Some(1024), 4096),
        ("linear", 4.0, None, 4096),
    ] {
        let stretched = config(Arch::Llama, |file| {
            file.str("llama.rope.scaling.type", kind);
            file.f32("llama.rope.scaling.factor", factor);
            if let Some(original) = original {
                file.u32("llama.rope.scaling.original_context_length", original);
            }
        });
        let stretched = stretched.expect("a configuration");
        assert_eq!(stretched.context_max, made_for, "{kind} {factor}");
        assert_eq!(stretched.beyond(made_for), None);
        let said = stretched.beyond(made_for + 1).expect("beyond");
        assert!(said.contains(&made_for.to_string()), "{said}");
    }

    let error = config(Arch::Qwen3, |file| {
        file.str("qwen3.rope.scaling.type", "longrope")
    });
    let error = error.expect_err("a scaling of another kind");
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.to_string().contains("longrope") && error.to_string().contains("YaRN"));
    for factor in [-4.0, f32::NAN, f32::INFINITY] {
        let error = config(Arch::Llama, |file| {
            file.f32("llama.rope.scaling.factor", factor)
        });
        assert_eq!(error.expect_err("no factor").kind(), Kind::Format);
    }
}
