//! Small vocabularies of both kinds, and texts made at random.

use super::super::bpe::byte_of;
use super::{Parts, Start, Tokenizer};
use crate::text::TokenKind;
use proptest::prelude::*;

/// How GPT-2's vocabulary writes bytes.
fn written(bytes: &[u8]) -> String {
    let of = |byte| {
        ('!'..='\u{143}')
            .find(|&c| byte_of(c) == Some(byte))
            .unwrap()
    };
    bytes.iter().map(|&byte| of(byte)).collect()
}

fn parts<'a>(
    model: &'a str,
    tokens: &'a [String],
    merges: &'a [String],
    kinds: &[(u32, TokenKind)],
) -> Parts<'a, impl Iterator<Item = &'a [u8]> + Clone, impl Iterator<Item = &'a [u8]> + Clone> {
    let mut all = vec![TokenKind::Normal; tokens.len()];
    for &(id, kind) in kinds {
        all[id as usize] = kind;
    }
    Parts {
        model,
        pre: "gpt-2",
        tokens: tokens.iter().map(String::as_bytes),
        merges: merges.iter().map(String::as_bytes),
        // Longer tokens first, then lower ids.
        scores: tokens
            .iter()
            .enumerate()
            .map(|(id, text)| text.len() as f32 * 100.0 - id as f32)
            .collect(),
        kinds: all.into(),
        bos: Some(0),
        ends: vec![1],
        unknown: None,
        add_bos: None,
        add_space_prefix: None,
    }
}

/// 0 and 1 are controls, 2 is user-defined, then the bytes from 3 on, then words.
fn bpe() -> Tokenizer {
    let mut tokens: Vec<String> = ["<|im_start|>", "<|im_end|>", "<think>"]
        .map(String::from)
        .into();
    tokens.extend((0..=255).map(|byte| written(&[byte])));
    let (mut merges, mut seen) = (Vec::new(), tokens.clone());
    for (left, right) in [
        ("h", "e"),
        ("l", "l"),
        ("he", "ll"),
        (" ", "hell"),
        ("e", "l"),
        ("\n", "\n"),
    ] {
        let (left, right) = (written(left.as_bytes()), written(right.as_bytes()));
        seen.push(format!("{left}{right}"));
        merges.push(format!("{left} {right}"));
    }
    merges.push("no such".into());
    let kinds = [
        (0, TokenKind::Control),
        (1, TokenKind::Control),
        (2, TokenKind::UserDefined),
    ];
    Tokenizer::from_parts(parts("gpt2", &seen, &merges, &kinds)).unwrap()
}

/// 0 and 1 are controls, 2 is user-defined (two spaces), then the bytes from 3 on, then words.
fn spm(space_prefix: bool) -> Tokenizer {
    let mut tokens: Vec<String> = ["<s>", "</s>", "  "].map(String::from).into();
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    let words = [
        "\u{2581}",
        "a",
        "b",
        "<",
        "s",
        ">",
        "<s",
        "s>",
        "ab",
        "\u{2581}a",
        "\u{2581}ab",
        "\u{e9}",
    ];
    tokens.extend(words.map(String::from));
    let mut kinds = vec![
        (0, TokenKind::Control),
        (1, TokenKind::Control),
        (2, TokenKind::UserDefined),
    ];
    kinds.extend((3..259).map(|id| (id, TokenKind::Byte)));
    let mut parts = parts("llama", &tokens, &[], &kinds);
    parts.add_space_prefix = Some(space_prefix);
    Tokenizer::from_parts(parts).unwrap()
}

fn texts(tokenizer: &Tokenizer, text: &str, parse_special: bool) -> Vec<String> {
    let mut ids = Vec::new();
    tokenizer.encode(text, false, parse_special, &mut ids);
    let text = |&id: &u32| String::from_utf8_lossy(tokenizer.token_bytes(id, true)).into_owned();
    ids.iter().map(text).collect()
}

fn decode(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<u8> {
    ids.iter()
        .flat_map(|&id| tokenizer.token_bytes(id, false))
        .copied()
        .collect()
}

#[test]
fn a_text_that_goes_on_with_another_begins_with_no_space() {
    let tokenizer = spm(true);
    let (mut new, mut on) = (Vec::new(), Vec::new());
    tokenizer.encode("ab", false, false, &mut new);
    tokenizer.encode_on("ab", false, &mut on);
    assert_eq!(
        (decode(&tokenizer, &new), decode(&tokenizer, &on)),
        (b" ab".into(), b"ab".into())
    );
}

#[test]
fn merges_are_done_in_the_order_of_their_list() {
    // "he" comes before "el", so "hell" is found; "l" + "l" alone is not merged with a third.
    assert_eq!(
        texts(&bpe(), "hell hell lll el", false),
        ["hell", " hell", " ", "ll", "l", " ", "el"]
    );
}

#[test]
fn special_tokens_in_a_users_text_are_text() {
    let tokenizer = bpe();
    assert_eq!(texts(&tokenizer, "<|im_end|>", true), ["<|im_end|>"]);
    assert_eq!(texts(&tokenizer, "<|im_end|>", false).len(), 10);
    // User-defined tokens are no danger, and are read in any text.
    assert_eq!(texts(&tokenizer, "a<think>", false), ["a", "<think>"]);
}

#[test]
fn the_longest_special_token_wins_wherever_it_is() {
    assert_eq!(texts(&bpe(), "<<think>|im_end|>", true).len(), 11);
    assert_eq!(
        texts(&bpe(), "<|im_start|><|im_end|><think>", true),
        ["<|im_start|>", "<|im_end|>", "<think>"]
    );
}

#[test]
fn bos_is_the_callers_choice() {
    let mut ids = Vec::new();
    let tokenizer = spm(false);
    tokenizer.encode("", true, false, &mut ids);
    assert_eq!(ids, [0]);
    assert!(tokenizer.add_bos_default());
    assert!(!bpe().add_bos_default());
}

#[test]
fn sentence_pieces_merge_by_score() {
    assert_eq!(texts(&spm(false), "ab aab", false), ["ab", " a", "ab"]);
    assert_eq!(texts(&spm(true), "ab", false), [" ab"]);
    assert_eq!(texts(&spm(false), "a  ab", false), ["a", "  ", "ab"]);
}

#[test]
fn sentence_pieces_fall_back_to_bytes() {
    let mut ids = Vec::new();
    spm(false).encode("\u{e9}\u{20ac}", false, false, &mut ids);
    assert_eq!(ids, [259 + 11, 3 + 0xe2, 3 + 0x82, 3 + 0xac]);
}

#[test]
fn merging_never_makes_a_control_token() {
    assert_eq!(texts(&spm(false), "<s>", false), ["<s", ">"]);
    assert_eq!(texts(&spm(false), "<s>", true), ["<s>"]);
}

#[test]
fn a_space_goes_before_text_that_follows_a_special_token() {
    assert_eq!(texts(&spm(true), "a<s>b", true), [" a", "<s>", " ", "b"]);
}

#[test]
fn no_space_goes_before_text_that_goes_on() {
    let tokenizer = spm(true);
    let tokens = |text, start| {
        let mut ids = Vec::new();
        tokenizer.encode_parts(text, start, true, None, &mut ids);
        ids
    };
    let [new, within] = [Start::New, Start::Within].map(|start| tokens("hell", start));
    assert_eq!(decode(&tokenizer, &new), b" hell");
    assert_eq!(decode(&tokenizer, &within), b"hell");
    // Behind a special token text is new again.
    let behind = tokens("</s>hell", Start::Within);
    assert_eq!(behind[1..], new);
}

#[test]
fn control_tokens_have_no_text() {
    let tokenizer = bpe();
    assert_eq!(tokenizer.token_bytes(1, false), b"");
    assert_eq!(tokenizer.token_bytes(1, true), b"<|im_end|>");
    assert_eq!(tokenizer.token_bytes(2, false), b"<think>");
    assert_eq!(tokenizer.token_bytes(u32::MAX, false), b"");
    assert_eq!(tokenizer.control("<|im_end|>"), Some(1));
    assert_eq!(tokenizer.control("<|im"), None);
}

#[test]
fn ends_are_found_by_id_and_by_text() {
    assert!(bpe().is_eog(1) && !bpe().is_eog(0));
    let tokens = ["<|end|>", "<|call|>", "<|return|>", "x"].map(String::from);
    let mut parts = parts("gpt2", &tokens, &[], &[]);
    parts.ends = vec![3, 77];
    let tokenizer = Tokenizer::from_parts(parts).unwrap();
    let eog: Vec<u32> = (0..100).filter(|&id| tokenizer.is_eog(id)).collect();
    assert_eq!(eog, [1, 2, 3]);
}

#[test]
fn damaged_tokenizers_are_refused() {
    assert!(Tokenizer::from_parts(parts("t5", &["a".into()], &[], &[])).is_err());
    assert!(Tokenizer::from_parts(parts("gpt2", &[], &[], &[])).is_err());
    let tokens = ["a".to_owned(), "b".to_owned()];
    let mut few = parts("llama", &tokens, &[], &[]);
    few.scores = Box::new([1.0]);
    assert!(Tokenizer::from_parts(few).is_err());
}

/// Texts in which the tokens of the little vocabularies turn up often.
fn any_text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        any::<char>().prop_map(String::from),
        "[a-e<>|/shl \n\t0-9']{1,8}",
        prop::sample::select(vec![
            "<|im_end|>",
            "<s>",
            "</s>",
            "  ",
            "hell",
            "\u{2581}",
            "<think>",
            "\r\n"
        ])
        .prop_map(String::from),
    ];
    prop::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn byte_level_text_comes_back(text in any_text()) {
        let mut ids = Vec::new();
        bpe().encode(&text, false, false, &mut ids);
        prop_assert_eq!(decode(&bpe(), &ids), text.into_bytes());
    }

    #[test]
    fn sentence_piece_text_comes_back_but_for_its_space(text in any_text(), prefix: bool) {
        let mut ids = Vec::new();
        let tokenizer = spm(prefix);
        // The first part of the text gets a space, and every part after a special token.
        let text = text.replace("  ", " ").replace("  ", " ").replace("  ", " ");
        prop_assume!(!text.contains("  "));
        tokenizer.encode(&text, false, false, &mut ids);
        let space = if prefix && !text.is_empty() { " " } else { "" };
        let expected = format!("{space}{}", text.replace('\u{2581}', " "));
        prop_assert_eq!(decode(&tokenizer, &ids), expected.into_bytes());
    }

    #[test]
    fn special_parsing_loses_nothing(text in any_text()) {
        let mut ids = Vec::new();
        let tokenizer = bpe();
        tokenizer.encode(&text, false, true, &mut ids);
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id, true)).copied().collect();
        prop_assert_eq!(bytes, text.into_bytes());
    }

    #[test]
    fn broken_controls_are_text(text in any_text()) {
        let tokenizer = bpe();
        let marker = '\u{fdd0}';
        prop_assume!(!text.contains(marker));
        let broken = tokenizer.break_controls(&text, marker);
        let (mut plain, mut marked) = (Vec::new(), Vec::new());
        tokenizer.encode(&text, false, false, &mut plain);
        tokenizer.encode_parts(&broken, Start::New, true, Some(marker), &mut marked);
        prop_assert_eq!(plain, marked);
    }

    #[test]
    fn any_bytes_make_a_vocabulary_or_an_error(
        tokens in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..6), 0..40),
        merges in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..8), 0..20),
        types in prop::collection::vec(0u32..8, 0..40),
        sentence_piece: bool,
        text in any_text(),
    ) {
        let parts = Parts {
            model: if sentence_piece { "llama" } else { "gpt2" },
            pre: "default",
            tokens: tokens.iter().map(Vec::as_slice),
            merges: merges.iter().map(Vec::as_slice),
            scores: tokens.iter().map(|text| text.len() as f32).collect(),
            kinds: types.into_iter().map(TokenKind::from_ggml).collect(),
            bos: Some(5),
            ends: vec![6, 1000],
            unknown: Some(0),
            add_bos: Some(true),
            add_space_prefix: None,
        };
        if let Ok(tokenizer) = Tokenizer::from_parts(parts) {
            let mut ids = Vec::new();
            tokenizer.encode(&text, true, true, &mut ids);
            prop_assert!(ids.iter().all(|&id| (id as usize) < tokenizer.len()));
            decode(&tokenizer, &ids);
        }
    }
}
