//! A model that says of its next token what is no number: its requests fail, and nobody else's.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use airstream::engine::request::Sampling;
use airstream::format::gguf::Gguf;
use airstream::format::quant::QuantType;
use half::f16;

use super::*;
use support::synth::SynthSpec;

/// A token whose embedding is damaged in the models of [`damaged_token`].
const BAD: u32 = 5;

/// A small model with these bytes written into a tensor, so far from its start.
fn damaged(arch: Arch, tensor: &str, at: u64, bytes: &[u8]) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.gguf");
    let spec = SynthSpec {
        tied: false,
        ..SynthSpec::new(arch, QuantType::Q8_0, 1)
    };
    write(&spec, &path).expect("written");
    let offset = {
        let gguf = Gguf::open(&path).expect("sound so far");
        gguf.tensor(tensor).expect("the tensor").offset
    };
    let file = OpenOptions::new().write(true).open(&path);
    file.and_then(|file| file.write_all_at(bytes, offset + at))
        .expect("written");
    (folder, path)
}

/// A model that fails once this one token was said. Blocks are a scale and 32 bytes, and rows of 8 blocks.
fn damaged_token(scale: f16) -> (TempDir, PathBuf) {
    let row_bytes = 8 * 34;
    let at = u64::from(BAD) * row_bytes + 2 * 34;
    damaged(Arch::Llama, "token_embd.weight", at, &scale.to_le_bytes())
}

/// Every way to choose a token.
fn samplings() -> [Sampling; 4] {
    [
        Sampling::greedy(),
        Sampling::default(),
        Sampling {
            repeat_penalty: 1.1,
            ..Sampling::default()
        },
        Sampling {
            top_k: 0,
            logit_bias: vec![(9, 1.0)],
            ..Sampling::default()
        },
    ]
}

#[test]
fn whatever_is_damaged_a_request_fails_instead_of_saying_the_same_for_ever() {
    let (nan, large) = (f16::NAN.to_le_bytes(), 3e38_f32.to_le_bytes());
    for arch in [Arch::Llama, Arch::Gemma3] {
        for (tensor, at, bytes) in [
            // One value of a norm, which comes to stand at various places of a block.
            ("output_norm.weight", 0, &f32::NAN.to_le_bytes()[..]),
            ("output_norm.weight", 4 * 37, &f32::NAN.to_le_bytes()),
            ("output_norm.weight", 4 * 255, &f32::INFINITY.to_le_bytes()),
            ("blk.0.attn_norm.weight", 4 * 100, &f32::NAN.to_le_bytes()),
            // One scale of a block.
            ("blk.1.ffn_down.weight", 34 * 21, &nan),
            ("blk.1.ffn_down.weight", 0, &f16::INFINITY.to_le_bytes()),
            // Weights that no number can hold the products of.
            ("blk.0.attn_v.weight", 0, &nan),
            ("blk.1.ffn_norm.weight", 4 * 3, &large),
        ] {
            let (_folder, path) = damaged(arch, tensor, at, bytes);
            let mut serving = Serving::open(&[("m", &path)], 2, 128, None, Limits::default());
            for sampling in samplings() {
                let what = format!("{arch:?}, {tensor}, {sampling:?}");
                let answer = serving.ask(&Generate {
                    sampling,
                    ..greedy(&[1, 2, 3], 8)
                });
                assert!(answer.tokens.is_empty(), "{what}: {:?}", answer.tokens);
                assert_eq!(answer.ending, Some(Ending::Failed(Kind::Format)), "{what}");
            }
        }
    }
}

#[test]
fn a_failed_request_leaves_its_conversation_and_its_neighbours_as_they_were() {
    for scale in [f16::NAN, f16::INFINITY] {
        let (_folder, path) = damaged_token(scale);
        let open = || Serving::open(&[("m", &path)], 3, 256, None, Limits::default());
        let robot = |tokens: &[u32]| Generate {
            session: Some("robot".into()),
            ..greedy(tokens, 12)
        };
        let mut sound = open();
        let first = sound.ask(&robot(&[1, 2, 3]));
        assert!(done(Reason::Length)(&first.ending) && !first.tokens.contains(&BAD));
        let talk = [&[1, 2, 3], &first.tokens[..], &[4]].concat();
        let second = sound.ask(&robot(&talk));
        let neighbour = sound.ask(&greedy(&[7, 8], 30));

        let mut serving = open();
        assert_eq!(serving.ask(&robot(&[1, 2, 3])), first);
        serving
            .submit(tag(1, 0), &greedy(&[7, 8], 30))
            .expect("room");
        for _ in 0..5 {
            serving.step();
        }
        // In the prompt, and in the answer.
        let in_prompt = robot(&[&talk[..], &[BAD]].concat());
        let in_answer = Generate {
            sampling: Sampling {
                logit_bias: vec![(BAD, 1e9)],
                ..Sampling::greedy()
            },
            ..greedy(&[9, 8], 12)
        };
        serving.submit(tag(2, 0), &in_prompt).expect("room");
        serving.submit(tag(3, 0), &in_answer).expect("room");
        serving.finish();
        for (client, said) in [(2, &[][..]), (3, &[BAD])] {
            let answer = &serving.answers[&tag(client, 0)];
            assert_eq!(answer.ending, Some(Ending::Failed(Kind::Format)));
            assert_eq!(answer.tokens, *said, "client {client}");
        }
        assert_eq!(serving.answers[&tag(1, 0)].tokens, neighbour.tokens);
        assert_eq!(serving.ask(&robot(&talk)).tokens, second.tokens);
        let all = all_slots(&mut serving);
        assert_eq!(all, all_slots(&mut open()), "no slot is lost");
    }
}
